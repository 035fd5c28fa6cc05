"""A finished stage enters; what the report shows of it leaves. A kind of stage says with `Shown` which of these it is
shown by."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath
from markupsafe import Markup

from mpo_jax import artifacts, metrics
from mpo_jax.data.account import Account
from mpo_jax.evaluation import figures, pairs, table

_SAMPLES = 8
"""Prompts whose replies are shown side by side."""
_COLUMNS = {
    "gold": "gold score",
    "reward": "reward model",
    "kl": "KL to the baseline, nats",
    "log_ratio": "log-ratio to the baseline, nats (no KL: replies of a truncated distribution)",
    "tokens": "length, tokens",
    "finished": "finished",
    "repetition": "repeated 4-grams",
    "distinct": "distinct 2-grams",
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished stage. manifest: as the pipeline wrote it."""

    name: str
    folder: epath.Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def settings(self) -> Mapping[str, Any]:
        return artifacts.read_json(self.folder / artifacts.CONFIG)["stages"].get(self.name, {})


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the report makes of a kind of stage. curves: (key of its metrics, label of the axis), drawn while it trains.
    figures: of its summary, by dotted names, those that `mpo runs` lists. part: of the page (see `report.PARTS`), to
    which `make` adds what it makes of each stage."""

    curves: tuple[tuple[str, str], ...] = ()
    figures: tuple[str, ...] = ()
    part: str = ""
    make: Callable[[Finished], Any] | None = None


def training(stages: Iterable[Finished], shown: Mapping[str, Shown]) -> Iterator[dict[str, Any]]:
    """The curves of every stage whose kind has some."""
    for stage in stages:
        plots = []
        for key, label in shown.get(stage.kind, Shown()).curves:
            names = {"training": key, "held out": f"eval/{key}"}
            if key == "score":
                names |= {"gold, held out": "eval/gold_score"}
            curves = {name: metrics.curve(stage.folder, of) for name, of in names.items()}
            curves = {name: points for name, points in curves.items() if points}
            if curves:
                plots.append(Markup(figures.lines(curves, "step", label)))
        if plots:
            yield {"name": stage.name, "kind": stage.kind, "plots": plots}


def preference(stage: Finished) -> dict[str, Any]:
    """What preference training is worth on held-out pairs."""
    summary = stage.manifest["summary"]
    error = pairs.standard_error(summary["judged"]["accuracy"], summary["heldout_pairs"])
    source = stage.manifest["inputs"]["pairs"][0]
    return {"name": stage.name, "source": f"{source['name']}/{source['part']}", "error": error, "summary": summary}


def split(stage: Finished) -> dict[str, Any]:
    """Easy, hard and flipped pairs, and the gaps that part them."""
    earlier = {"scored_by": "the reward model", "unit": "reward units"}  # what reports of earlier versions leave unsaid
    report = earlier | artifacts.read_json(stage.folder / artifacts.REPORT)
    gap = artifacts.read_gaps(stage.folder).gap
    return {
        "name": stage.name,
        "report": report,
        "histogram": Markup(figures.histogram(gap, report["threshold"], report["unit"])),
        "samples": artifacts.read_json(stage.folder / artifacts.SAMPLE_PAIRS),
    }


def evaluation(stage: Finished) -> dict[str, Any]:
    """Policies compared, and some of their replies."""
    report = artifacts.read_json(stage.folder / artifacts.REPORT)
    rows = artifacts.read_lines(stage.folder / artifacts.REPLIES_FILE)
    policies = report["policies"]
    wins = table.wins(report)
    frontier = {
        name: [(point["kl"], point["score"]) for point in points] for name, points in report["frontier"].items()
    }
    return {
        "name": stage.name,
        "report": report,
        "columns": {key: _COLUMNS[key] for key in table.columns(report)},
        "cells": {name: {key: table.cell(means, key) for key in _COLUMNS} for name, means in policies.items()},
        "notes": table.notes(report),
        "judges": list(dict.fromkeys(by for _, by in wins)),
        "wins": wins,
        "frontier": Markup(figures.lines(frontier, f"KL to {report['baseline']}, nats", "reward model's score", "o"))
        if frontier
        else None,
        "samples": rows[:_SAMPLES],
    }


def data(stages: Iterable[Finished]) -> list[dict[str, Any]]:
    """What each stage read, and what became of every row and column; stages that read the same stand together."""
    read: dict[str, list[str]] = {}
    for stage in stages:
        for account in stage.manifest.get("data", []):
            read.setdefault(Account(**account).text(), []).append(stage.name)
    return [{"text": text, "stages": ", ".join(dict.fromkeys(names))} for text, names in read.items()]


def verdicts(stage: Finished) -> dict[str, Any]:
    """A judge's table."""
    return {"name": stage.name} | artifacts.read_json(stage.folder / artifacts.JUDGE_TABLE)
