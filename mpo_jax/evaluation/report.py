"""A run's folder enters; report.html leaves: one page that asks for nothing else, of the stages that are finished; and
beside it the same as Markdown, and every figure with its numbers (`beside`).

Every section is a template of its own; one whose stage is absent is left out. Templates escape what they show, so a
reply that holds markup is read as text.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from markupsafe import Markup

from mpo_jax import artifacts, progress
from mpo_jax.artifacts import BASE
from mpo_jax.errors import InputError
from mpo_jax.evaluation import beside, effort, figures, human, pages, sections, signatures, validation
from mpo_jax.evaluation.sections import Finished, Shown

PARTS = ("evaluations", "preferences", "splits", "judge", "rewards")
"""Of the page, to which kinds of stages add: see `sections.Shown`."""


def write(workdir: epath.Path, shown: Mapping[str, Shown]) -> epath.Path:
    """Renders WORKDIR/report.html and what lies beside it, each file whole or not at all. shown: of every kind."""
    workdir = epath.Path(workdir)
    shown_page = page(workdir, shown)
    for line in shown_page["left_out"]:
        progress.say(f"report: left out {line}", sys.stderr)
    target = workdir / artifacts.REPORT_PAGE
    # The page last: a run whose page is younger than its stages is not drawn again.
    try:
        beside.write(workdir, shown_page)
    except Exception as error:  # the page is what a run is read by
        progress.say(f"report: no {artifacts.REPORT_TEXT} beside it: {type(error).__name__}: {error}", sys.stderr)
    artifacts.write_text(target, pages.environment(escaped=True).get_template("report.html").render(shown_page))
    return target


def page(workdir: epath.Path, shown: Mapping[str, Shown]) -> dict[str, Any]:
    """What each template shows; None for a section without a stage. left_out: what is wrong with those that can't be
    shown, a line each: a damaged file of one stage must cost neither the page nor a run that has come to its end."""
    stages, damaged = finished(workdir)
    judged = functools.cache(lambda: human.judged(workdir))  # asked where a part that fails is left out alone
    makers: dict[str, Callable[[], Any]] = {
        "graph": lambda: _graph(stages),
        "training": lambda: list(sections.training(stages, shown)),
        "human": lambda: human.section(judged(), {stage.name: stage.folder for stage in stages}),
        "agreements": lambda: sections.agreements(stages, judged()),
        "validation": lambda: validation.section(stages),
        "data": lambda: sections.data(stages),
        "efforts": lambda: effort.section(stages, shown),
        "signs": lambda: signatures.of_stages(stages),
    }
    makers |= {part: functools.partial(_part, part, stages, shown) for part in PARTS}
    values: dict[str, Any] = {"title": workdir.name, "provenance": sections.provenance(stages), "left_out": damaged}
    for name, maker in makers.items():
        try:
            values[name] = maker()
        except Exception as error:
            values[name] = None
            values["left_out"].append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return values


def _part(part: str, stages: list[Finished], shown: Mapping[str, Shown]) -> list[Any]:
    known = ((stage, shown.get(stage.kind, Shown())) for stage in stages)
    made = (kind.make(stage) for stage, kind in known if kind.part == part and kind.make is not None)
    return [each for each in made if each is not None]


def finished(workdir: epath.Path) -> tuple[list[Finished], list[str]]:
    """The finished stages whose files are as they were written, in the order of the graph, and what is wrong with the
    others."""
    whole, damaged = [], []
    for name, folder in artifacts.stage_folders(workdir).items():
        try:
            if (manifest := artifacts.read_manifest(folder)) is not None:
                artifacts.verify(folder, weights=False)
                whole.append(Finished(name, folder, manifest))
        except InputError as error:
            damaged.append(f"{name}: {error}")
    return whole, damaged


def _graph(stages: list[Finished]) -> Markup | None:
    if not stages:
        return None
    sources = {
        stage.name: list(dict.fromkeys(entry["name"] for given in stage.manifest["inputs"].values() for entry in given))
        for stage in stages
    }
    begins = any(BASE in above for above in sources.values())
    kinds = {BASE: "model"} | {stage.name: stage.kind for stage in stages}
    return Markup(figures.graph(({BASE: []} if begins else {}) | sources, kinds))
