"""A finished stage enters; what the report shows of it leaves. A kind of stage says with `Shown` which of these it is
shown by."""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from markupsafe import Markup

from mpo_jax import artifacts, metrics
from mpo_jax.data.account import Account
from mpo_jax.evaluation import agreement, figures, human, judge, pairs, statistics, table, verdict
from mpo_jax.evaluation.annotation import Judgement

_SAMPLES, _OPEN = 60, 3
"""Prompts whose replies are shown side by side, and how many of them at once."""
COLUMNS = {
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

    def read_as(self, role: str) -> epath.Path | None:
        """The folder of the run's stage that this one read in a role; None where it read none, or the run has it no
        more."""
        given = self.manifest.get("inputs", {}).get(role, ())
        return artifacts.stage_folders(self.folder.parent).get(given[0]["name"]) if given else None


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the report makes of a kind of stage. curves: (key of its metrics, label of the axis), drawn while it trains.
    pictures: further figures of its training, before those. figures: of its summary, by dotted names, those that `mpo
    runs` lists. part: of the page (see `report.PARTS`), to which `make` adds what it makes of each stage. learns: what
    a policy's training learns from, in the plural."""

    curves: tuple[tuple[str, str], ...] = ()
    pictures: Callable[[Finished], Iterable[Markup]] | None = None
    figures: tuple[str, ...] = ()
    part: str = ""
    make: Callable[[Finished], Any] | None = None
    learns: str = ""


def training(stages: Iterable[Finished], shown: Mapping[str, Shown]) -> Iterator[dict[str, Any]]:
    """The curves of every stage whose kind has some."""
    for stage in stages:
        kind = shown.get(stage.kind, Shown())
        plots = [] if kind.pictures is None else [*kind.pictures(stage)]
        for key, label in kind.curves:
            names = {"training": key, "held out": f"eval/{key}"}
            curves = {name: metrics.curve(stage.folder, of) for name, of in names.items()}
            curves = {name: points for name, points in curves.items() if points}
            if curves:
                plots.append(figures.lines(curves, "step", label))
        if plots:
            yield {"name": stage.name, "kind": stage.kind, "plots": plots}


def preference(stage: Finished) -> dict[str, Any]:
    """What preference training is worth on held-out pairs."""
    summary = stage.manifest["summary"]
    judged, count = summary["judged"], summary["heldout_pairs"]
    error = pairs.standard_error(judged["accuracy"], count)
    apart = {bucket: pairs.of_bucket(judged, bucket, count) for bucket in ("easy", "hard")}
    given = stage.manifest["inputs"].get("pairs") or [{"name": "the data", "part": ""}]
    source = "/".join(filter(None, (given[0]["name"], given[0]["part"])))
    return {
        "name": stage.name,
        "source": source,
        "accuracy": verdict.with_error(judged["accuracy"], error),
        "apart": {bucket: verdict.with_error(*found[:2]) if found else None for bucket, found in apart.items()},
        "summary": summary,
    }


def split(stage: Finished) -> dict[str, Any]:
    """Easy, hard and flipped pairs, and the gaps that part them."""
    earlier = {"scored_by": "the reward model", "unit": "reward units"}  # what reports of earlier versions leave unsaid
    report = earlier | artifacts.read_json(stage.folder / artifacts.REPORT)
    gap = artifacts.read_gaps(stage.folder).gap
    return {
        "name": stage.name,
        "report": report,
        "histogram": figures.histogram(gap, report["threshold"], report["unit"]),
        "samples": artifacts.read_json(stage.folder / artifacts.SAMPLE_PAIRS),
    }


def evaluation(stage: Finished) -> dict[str, Any]:
    """Policies compared, and some of their replies."""
    report = {"errors": {}, "verdict": None} | artifacts.read_json(stage.folder / artifacts.REPORT)  # earlier versions'
    rows = artifacts.read_lines(stage.folder / artifacts.REPLIES_FILE)
    policies = report["policies"]
    wins = table.wins(report)
    frontier = {
        name: [(point["kl"], point["score"]) for point in points] for name, points in report["frontier"].items()
    }
    columns = table.columns(report)
    return {
        "name": stage.name,
        "report": report,
        "verdict": _verdict(report["verdict"]),
        "columns": {key: COLUMNS[key] for key in columns},
        "main": [key for key in table.MAIN if key in columns],
        "cells": {name: {key: table.cell(report, name, key) for key in columns} for name in policies},
        "notes": table.notes(report),
        "judges": list(dict.fromkeys(by for _, by in wins)),
        "wins": wins,
        "frontier": figures.lines(frontier, f"KL to {report['baseline']}, nats", "reward model's score", "o")
        if frontier
        else None,
        "curves": _curves(report.get("curves")),
        "samples": _samples(rows, report["verdict"], report["baseline"]),
        "open": _OPEN,
    }


def _curves(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Curves of score against KL, drawn, and the scores at common KL values as text."""
    if given is None:
        return None
    drawn = figures.plane(given["points"], f"KL to {given['baseline']}, nats", f"score by {given['by']}")
    cells = {name: [verdict.with_interval(cell) for cell in row] for name, row in given["scores"].items()}
    return dict(given) | {"drawn": drawn, "cells": {name: row for name, row in cells.items() if any(row)}}


def _samples(rows: Sequence[Mapping[str, Any]], given: Mapping[str, Any] | None, baseline: str) -> list[dict[str, Any]]:
    """Prompts that begin unlike each other, from all over the order by how much higher the verdict's policy scores than
    the baseline; the highest first."""
    unlike: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        unlike.setdefault(row["prompt"][-60:].strip().lower(), row)
    chosen = [dict(row) | {"apart": None} for row in unlike.values()]
    if given is not None and baseline and given["name"] != baseline:
        key = next(key for key, by in statistics.JUDGES if by == given["by"])
        for row in chosen:
            own, other = (row["replies"][name][key] for name in (given["name"], baseline))
            row["apart"] = None if own is None or other is None else own - other
        chosen.sort(key=lambda row: -np.inf if row["apart"] is None else row["apart"], reverse=True)
    if len(chosen) <= _SAMPLES:
        return chosen
    return [chosen[round(place)] for place in np.linspace(0, len(chosen) - 1, _SAMPLES)]


def _verdict(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A verdict with a picture of each interval, all on one scale."""
    if given is None:
        return None
    scores = [each["difference"] for each in given["against"]]
    reach = 1.1 * max([1e-9, *(abs(edge) for score in scores for edge in (score["low"], score["high"]))])
    rows = []
    for each in given["against"]:
        score, wins = each["difference"], each["wins"]
        drawn = figures.interval(score["mean"], score["low"], score["high"], (-reach, reach), 0)
        won = figures.interval(wins["rate"], wins["low"], wins["high"], (0, 1), 0.5)
        rows.append(
            {
                "name": each["name"],
                "outcome": verdict.outcome(each),
                "difference": verdict.with_interval(score, "+"),
                "wins": f"{100 * wins['rate']:.0f} % [{100 * wins['low']:.0f}, {100 * wins['high']:.0f}]",
                "p": [verdict.told_p(part["adjusted_p"]) for part in (score, wins)],
                "kl": each["kl"],
                "drawn": [Markup(drawn), Markup(won)],
            }
        )
    equal = given.get("at_equal_kl", "")
    return dict(given) | {"rows": rows, "told": given["sentences"][0], "at_equal_kl": equal}


def data(stages: Iterable[Finished]) -> list[dict[str, Any]]:
    """What each stage read, and what became of every row and column; stages that read the same stand together."""
    read: dict[str, list[str]] = {}
    for stage in stages:
        for account in stage.manifest.get("data", []):
            read.setdefault(Account(**account).text(), []).append(stage.name)
    return [{"text": text, "stages": ", ".join(dict.fromkeys(names))} for text, names in read.items()]


def provenance(stages: list[Finished]) -> dict[str, Any] | None:
    """Where a run's artifacts come from, and what each took. device_hours: None where a stage was resumed, since then
    nobody knows how long it took in all."""
    if not stages:
        return None
    rows = []
    for stage in stages:
        manifest, seconds = stage.manifest, stage.manifest.get("seconds")
        count = int(manifest.get("devices", "1 x").split(" x ")[0].split()[0])
        rows.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "key": manifest["key"],
                "inputs": {role: given for role, given in manifest["inputs"].items() if given},
                "seconds": seconds,
                "device_hours": None if seconds is None else seconds * count / 3600,
                "changed": manifest.get("changed", {}).get("stage", {}),
                "made": (stage.folder / artifacts.MANIFEST).stat().mtime,
            }
        )
    latest = [stage.manifest for _, stage in sorted(zip(rows, stages, strict=True), key=lambda each: -each[0]["made"])]

    def told(key: str, default: Any = "") -> Any:  # earlier versions left some unsaid
        return next((manifest[key] for manifest in latest if manifest.get(key)), default)

    made = datetime.datetime.fromtimestamp(max(row["made"] for row in rows), datetime.UTC)
    known = [row["device_hours"] for row in rows if row["device_hours"] is not None]
    return {
        "rows": rows,
        "made": f"{made:%Y-%m-%d %H:%M} UTC",
        "shared": told("shared"),
        "packages": told("packages", {}),
        "told": {key: told(key) for key in ("command", "commit", "devices") if told(key)},
        "changed": told("changed", {"run": {}})["run"],
        "device_hours": sum(known),
        "unknown": len(rows) - len(known),
    }


def verdicts(stage: Finished) -> dict[str, Any]:
    """A judge's table."""
    return {"name": stage.name} | artifacts.read_json(stage.folder / artifacts.JUDGE_TABLE)


def agreements(stages: Iterable[Finished], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """How far each two judges of the same evaluation agree, the run's judge stages and people: see
    `agreement.between`."""
    stages = list(stages)
    judges: dict[str, dict[str, Any]] = {}
    for stage in stages:
        read = stage.manifest.get("inputs", {}).get("evaluate", [])
        if read and (stage.folder / artifacts.VERDICTS_FILE).exists():
            name = f"{stage.name}, by {artifacts.read_json(stage.folder / artifacts.JUDGE_TABLE)['by']}"
            lines = artifacts.read_lines(stage.folder / artifacts.VERDICTS_FILE)
            judges.setdefault(read[0]["key"], {})[name] = agreement.of_lines(lines)
    found = []
    for stage in stages:
        asked = judges.get(stage.manifest["key"], {})
        if asked and judgements:
            asked |= {"people": human.outcomes(judge.read_replies(stage.folder / artifacts.REPLIES_FILE), judgements)}
        found += [{"evaluation": stage.name} | each for each in agreement.between(asked)]
    return found
