"""The policies of an evaluation enter; how much data each has seen, in how many updates, leaves: a difference between
policies may come from that too.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mpo_jax import metrics
from mpo_jax.evaluation import verdict
from mpo_jax.evaluation.sections import Finished, Shown


@dataclasses.dataclass(frozen=True)
class Effort:
    """A training's. what: it learns from, in the plural. rows: that there were of those. distinct, seen: that it saw,
    each once, and with those that came again. updates: of the weights. generated: tokens of its own replies; 0 where it
    sampled none. about: some steps were not logged, and are taken to be as the others."""

    stage: str
    what: str
    rows: int
    distinct: int
    seen: int
    updates: int
    generated: int
    about: bool


def section(stages: Sequence[Finished], shown: Mapping[str, Shown]) -> list[dict[str, Any]]:
    """For each evaluation: its policies with the trainings that each rests on, those that all rest on apart, and a
    sentence. Policies that nothing trained are left out, evaluations of fewer than two trained ones too."""
    made = {stage.name: stage for stage in stages}
    found = []
    for stage in stages:
        if shown.get(stage.kind, Shown()).part != "evaluations":
            continue
        names = [entry["name"] for entry in stage.manifest["inputs"].get("policies", ())]
        chains = {name: list(_chain(name, made, shown)) for name in names}
        chains = {name: chain for name, chain in chains.items() if chain}
        if len(chains) < 2:
            continue
        common = [each for each in min(chains.values(), key=len) if all(each in chain for chain in chains.values())]
        own = {name: [each for each in chain if each not in common] for name, chain in chains.items()}
        own = {name: chain for name, chain in own.items() if chain}
        rows = [{"name": name, "trainings": chain, "total": _total(chain)} for name, chain in own.items()]
        found.append({"name": stage.name, "common": common, "rows": rows, "told": told(rows)})
    return [each for each in found if each["rows"]]


def of_stage(stage: Finished, what: str) -> Effort | None:
    """Of a finished training; None where its manifest does not say."""
    summary = stage.manifest["summary"] or {}
    if not summary.get("steps") or not summary.get("epochs"):
        return None
    steps = summary["steps"]
    seen = steps * stage.settings["batch_size"]
    rows = round(seen / summary["epochs"])
    logged = metrics.read(stage.folder)
    updates, generated = (
        [row[key] for row in logged if key in row] for key in ("updates", "response_tokens")
    )  # of those that sample
    return Effort(
        stage=stage.name,
        what=what,
        rows=rows,
        distinct=min(rows, seen),
        seen=seen,
        updates=round(sum(updates) * steps / len(updates)) if updates else steps - summary.get("skipped", 0),
        generated=round(sum(generated) * steps / len(generated)) if generated else 0,
        about=bool(updates) and len(updates) < steps,
    )


def _chain(name: str, made: Mapping[str, Finished], shown: Mapping[str, Shown]) -> Iterator[Effort]:
    """The trainings that a policy rests on by what each began with, the first one first."""
    stage = made.get(name)
    if stage is None:
        return
    for entry in stage.manifest["inputs"].get("init", ()):
        yield from _chain(entry["name"], made, shown)
    what = shown.get(stage.kind, Shown()).learns
    if what and (effort := of_stage(stage, what)) is not None:
        yield effort


def _total(chain: Iterable[Effort]) -> dict[str, int]:
    return {key: sum(getattr(each, key) for each in chain) for key in ("distinct", "seen", "updates", "generated")}


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the policies saw the same amounts, in a sentence. rows: see `section`."""
    words = {
        "distinct": "distinct pairs or prompts",
        "seen": "pairs or prompts with repetition",
        "updates": "updates",
        "generated": "tokens generated",
    }
    unequal = []
    for key, what in words.items():
        values = {row["name"]: row["total"][key] for row in rows}
        least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        if values[least] != values[most]:
            unequal.append(f"{what} from {values[least]:,} ({least}) to {values[most]:,} ({most})")
    if not unequal:
        return "All policies saw the same amount of data in as many updates."
    return f"The policies did not learn from equal data in equal steps: {verdict.listed(unequal)}."
