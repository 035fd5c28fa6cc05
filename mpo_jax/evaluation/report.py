"""A run's folder enters; report.html leaves: one page that asks for nothing else, of the stages that are finished.

Every section is a template of its own; one whose stage is absent is left out. Templates escape what they show, so a
reply that holds markup is read as text.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from mpo_jax import checkpoint, metrics
from mpo_jax.evaluation import figures, human, judge, pairs, validation
from mpo_jax.lines import split_lines

NAME = "report.html"
_SAMPLES = 8
"""Prompts whose replies are shown side by side."""
_COLUMNS = {
    "gold": "gold score",
    "reward": "reward model",
    "kl": "KL to the baseline, nats",
    "tokens": "length, tokens",
    "finished": "finished",
    "repetition": "repeated 4-grams",
    "distinct": "distinct 2-grams",
}
_CURVES = {
    "sft": (("loss", "loss, nats per token"),),
    "reward": (("loss", "loss"), ("accuracy", "accuracy")),
    "dpo": (("loss", "loss"), ("reward_margin", "reward margin")),
    "ppo": (("score", "score"), ("kl", "KL to the reference, nats")),
}
"""What is drawn of each kind of training stage: the key of its metrics, and the axis."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A finished stage. manifest: as the pipeline wrote it."""

    name: str
    folder: epath.Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]


def write(workdir: epath.Path) -> epath.Path:
    """Renders WORKDIR/report.html, whole or not at all."""
    workdir = epath.Path(workdir)
    loader = jinja2.PackageLoader("mpo_jax.evaluation", "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    shown = sections(workdir)
    for line in shown["left_out"]:
        print(f"report: left out {line}", file=sys.stderr)
    page = environment.get_template("report.html").render(shown)
    target, partial = workdir / NAME, workdir / f"{NAME}.partial"
    partial.write_text(page)
    partial.replace(target)
    return target


def sections(workdir: epath.Path) -> dict[str, Any]:
    """What each template shows; None for a section without a stage. left_out: what is wrong with those that can't be
    shown, a line each: a damaged file of one stage must cost neither the page nor a run that has come to its end."""
    stages = finished(workdir)
    folders = {stage.name: stage.folder for stage in stages}
    makers: dict[str, Callable[[], Any]] = {
        "graph": lambda: _graph(stages),
        "evaluations": lambda: [_evaluation(stage) for stage in stages if stage.kind == "evaluate"],
        "training": lambda: list(_training(stages)),
        "preferences": lambda: [_preference(stage) for stage in stages if stage.kind == "dpo"],
        "splits": lambda: [_split(stage) for stage in stages if stage.kind == "split"],
        "judge": lambda: judge.section(folders),
        "human": lambda: human.section(workdir, folders),
        "validation": lambda: validation.section(folders),
    }
    found: dict[str, Any] = {"title": workdir.name, "provenance": stages, "left_out": []}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            found[name] = None
            found["left_out"].append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return found


def finished(workdir: epath.Path) -> list[Stage]:
    """The stages of stages.json that have a manifest, in its order."""
    return [Stage(name, *found) for name, found in checkpoint.finished_stages(workdir).items()]


def _graph(stages: list[Stage]) -> Markup | None:
    if not stages:
        return None
    sources = {
        stage.name: list(dict.fromkeys(entry["name"] for given in stage.manifest["inputs"].values() for entry in given))
        for stage in stages
    }
    begins = any("base" in above for above in sources.values())
    kinds = {"base": "model"} | {stage.name: stage.kind for stage in stages}
    return Markup(figures.graph(({"base": []} if begins else {}) | sources, kinds))


def _training(stages: list[Stage]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        plots = []
        for key, label in _CURVES.get(stage.kind, ()):
            names = {"training": key, "held out": f"eval/{key}"}
            if key == "score":
                names |= {"gold, held out": "eval/gold_score"}
            curves = {name: metrics.curve(stage.folder, of) for name, of in names.items()}
            curves = {name: points for name, points in curves.items() if points}
            if curves:
                plots.append(Markup(figures.lines(curves, "step", label)))
        if plots:
            yield {"name": stage.name, "kind": stage.kind, "plots": plots}


def _preference(stage: Stage) -> dict[str, Any]:
    """What a dpo stage is worth on held-out pairs."""
    summary = stage.manifest["summary"]
    error = pairs.standard_error(summary["judged"]["accuracy"], summary["heldout_pairs"])
    source = stage.manifest["inputs"]["pairs"][0]
    return {"name": stage.name, "source": f"{source['name']}/{source['part']}", "error": error, "summary": summary}


def _split(stage: Stage) -> dict[str, Any]:
    report = json.loads((stage.folder / "report.json").read_text())
    with (stage.folder / "gaps.npz").open("rb") as file, np.load(file) as arrays:
        gap = arrays["gap"]
    return {
        "name": stage.name,
        "report": report,
        "histogram": Markup(figures.histogram(gap, report["threshold"])),
        "samples": json.loads((stage.folder / "samples.json").read_text()),
    }


def _evaluation(stage: Stage) -> dict[str, Any]:
    report = json.loads((stage.folder / "report.json").read_text())
    rows = [json.loads(line) for line in split_lines((stage.folder / "replies.jsonl").read_text())]
    policies = report["policies"]
    wins = {(c["left"], c["by"]): c for c in report["comparisons"] if c["right"] == report["baseline"]}
    frontier = {
        name: [(point["kl"], point["score"]) for point in points] for name, points in report["frontier"].items()
    }
    return {
        "name": stage.name,
        "report": report,
        "columns": {key: head for key, head in _COLUMNS.items() if all(key in means for means in policies.values())},
        "judges": list(dict.fromkeys(by for _, by in wins)),
        "wins": wins,
        "frontier": Markup(figures.lines(frontier, f"KL to {report['baseline']}, nats", "reward model's score", "o"))
        if frontier
        else None,
        "samples": rows[:_SAMPLES],
    }
