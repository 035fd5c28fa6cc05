"""An evaluation's policies enter, with the weights that their stages kept on the way; which of those are to be sampled
leaves, and then, from their scores and KL, the report's curves of score against KL.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_jax import artifacts
from mpo_jax.artifacts import BASE
from mpo_jax.data.plan import sample_rows
from mpo_jax.evaluation import curves, statistics
from mpo_jax.evaluation.curves import Curve
from mpo_jax.settings import Section, Whole, setting
from mpo_jax.stages import decodings
from mpo_jax.stages.base import PolicyTraining
from mpo_jax.stages.decodings import Entry
from mpo_jax.stages.job import Artifact, Job


class Curves(Section):
    """How the policies' snapshots are evaluated."""

    curve_prompts: Whole = setting(
        0,
        "number of held-out prompts that the policies' snapshots reply to; 0: as many as `count`",
        unit="prompts",
        later=True,
    )


class Snapshot(Entry):
    """A policy's weights after a step of its training; it has no row in the table."""

    @classmethod
    def of(cls, policy: str, step: int) -> "Snapshot":
        return cls(f"{policy} after step {step}", policy)


def check(job: Job) -> None:
    """InputError for prompts of snapshots where there will be none."""
    if job.settings.curve_prompts and not planned(job):
        raise job.error(
            "curve_prompts",
            f"{job.settings.curve_prompts}, but there are no curves: they need a policy whose stage has snapshots, a "
            "baseline, a scorer, and sampling without top_k, top_p and the like",
        )


def planned(job: Job) -> int:
    """How many snapshots the policies' stages are to keep; 0 where the evaluation draws no curves."""
    stages = (job.config.stages[name] for name in job.settings.policies if name != BASE)
    kept = sum(stage.snapshots for stage in stages if isinstance(stage, PolicyTraining))
    return kept if kept and _drawn(job) else 0


def _drawn(job: Job) -> bool:
    """Whether there can be curves: a KL, and somebody who scores."""
    settings = job.settings
    truncated = decodings.how(job, decodings.entries(settings)[0]).truncation
    return bool(settings.baseline and not truncated and (settings.reward or settings.labeller))


def prompts(job: Job, count: int) -> np.ndarray:
    """Which of the evaluation's prompts, i64, snapshots reply to: a fair sample."""
    return sample_rows(count, job.settings.curve_prompts or count)


def snapshots(job: Job) -> dict[str, list[tuple[int, Snapshot]]]:
    """Policy -> its snapshots with their steps, as its finished stage has kept them; {} where there are no curves."""
    if not _drawn(job):
        return {}
    return {
        artifact.name: [(step, Snapshot.of(artifact.name, step)) for step in _summary(artifact).get("snapshots", ())]
        for artifact in job.inputs["policies"]
    }


def section(
    job: Job,
    columns: Mapping[str, Mapping[str, np.ndarray]],
    kept: Mapping[str, Sequence[tuple[int, Snapshot]]],
    rows: np.ndarray,
    subject: str,
) -> dict[str, Any] | None:
    """The report's curves; None where no policy has a snapshot. columns: numbers of each prompt, of policies and of
    snapshots. rows: see `prompts`. subject: the verdict's policy. A curve begins with the policy that its training
    began with, if that is one of the evaluation's."""
    if not any(kept.values()):
        return None
    found: dict[str, tuple[list[int], list[Mapping[str, np.ndarray]], int, str]] = {}
    for artifact in job.inputs["policies"]:
        own, begins = {key: values[rows] for key, values in columns[artifact.name].items()}, _begins(job, artifact)
        points = [(step, columns[snapshot.name]) for step, snapshot in kept[artifact.name]]
        if begins and points:
            points.insert(0, (0, {key: values[rows] for key, values in columns[begins].items()}))
        last = _last_step(job, artifact)
        place = sum(step < last for step, _ in points)
        points.insert(place, (last, own))
        steps, read = zip(*points, strict=True)
        found[artifact.name] = list(steps), list(read), place, begins if len(points) > 1 else ""
    for key, by in statistics.JUDGES:
        if any(key not in point for _, read, _, _ in found.values() for point in read):
            continue
        scored = ~np.isnan([point[key] for _, read, _, _ in found.values() for point in read]).any(0)
        if scored.sum() < 2:
            continue
        made = {
            name: Curve(
                steps,
                np.array([point["kl"][scored] for point in read], np.float64),
                np.array([point[key][scored] for point in read], np.float64),
                place,
                begins,
            )
            for name, (steps, read, place, begins) in found.items()
        }
        return curves.section(made, subject, by, job.settings.baseline, job.settings.bootstrap, job.seed)
    return None


def _begins(job: Job, artifact: Artifact) -> str:
    """The evaluation's other policy that a policy's training began with, or ""."""
    init = "" if artifact.name == BASE else getattr(job.config.stages[artifact.name], "init", "")
    return init if init in job.settings.policies and init != artifact.name else ""


def _last_step(job: Job, artifact: Artifact) -> int:
    """After which step of its training a policy's weights are."""
    summary = _summary(artifact)
    best = artifact.name != BASE and getattr(job.config.stages[artifact.name], "select", "last") == "best"
    return (summary.get("best_step") if best else None) or summary.get("steps", 0)


def _summary(artifact: Artifact) -> Mapping[str, Any]:
    manifest = None if artifact.name == BASE else artifacts.read_manifest(artifact.folder)
    return (manifest or {}).get("summary") or {}
