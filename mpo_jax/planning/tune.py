"""A stage that was planned enters; the operational settings with which it takes the fewest seconds leave.

Settings that leave the results and the stage's key alone are tried one after the other, each with the best of those
before it: microbatch, remat, score_batch. The mesh is not among them, since all stages of a run share it.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.planning import compile as compiler
from mpo_jax.planning import stages
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.stages import StagePlan
from mpo_jax.run import Run
from mpo_jax.sharding import BATCH_AXES, axis_size
from mpo_jax.stages.base import Training
from mpo_jax.stages.job import Job

LIMIT = 10
"""Plans of a stage that are tried, at most."""
_REMATS = ("none", "dots", "full")
_SCORED = (2, 4, 8)  # times batch_size


@dataclasses.dataclass(frozen=True)
class Tuned:
    """flags: to be added to the command line; none: nothing tried is better. plan: of the stage with them."""

    flags: tuple[str, ...]
    plan: StagePlan
    tried: int


def tune(
    config: Run, name: str, before: StagePlan, place: Topology, assumptions: Assumptions, known: compiler.Known
) -> Tuned:
    """The fastest of what fits, and among equally fast ones the one that needs the least memory.

    before: the stage's plan as the config has it. known: programs compiled before; what a setting leaves alone is not
    compiled again.
    """
    job = stages.jobs(config, place, [name])[name]
    changed: dict[str, Any] = {}
    best, tried = before, 0
    for key, values in choices(config, name, job):
        for value in values:
            if tried == LIMIT:
                break
            change = changed | {f"stages.{name}.{key}": value}
            try:
                trial = stages.jobs(settings.replaced(config, change), place, [name])[name]
                planned = stages.plan(trial, place, assumptions, known=known)
            except InputError:  # rows that the mesh does not divide
                continue
            tried += 1
            if _cost(planned) < _cost(best):
                best, changed = planned, change
    return Tuned(tuple(f"--config.{key}={value}" for key, value in changed.items()), best, tried)


def choices(config: Run, name: str, job: Job) -> Iterator[tuple[str, list[Any]]]:
    """What to try for a stage: setting -> values beside the one it has, in order."""
    stage = config.stages[name]
    if isinstance(stage, Training):
        shards = axis_size(job.mesh, BATCH_AXES)
        halves = itertools.takewhile(
            lambda rows: rows >= shards and stage.update_rows % rows == 0,
            (stage.update_rows >> power for power in range(1, stage.update_rows.bit_length())),
        )
        yield "microbatch", [rows for rows in (0, *halves) if rows != stage.microbatch]
        yield "remat", [remat for remat in _REMATS if remat != (stage.remat or config.model.remat)]
    if "score_batch" in type(stage).model_fields:
        rows = [times * stage.batch_size for times in _SCORED]
        yield "score_batch", [each for each in rows if each != stage.score_batch]


def _cost(plan: StagePlan) -> tuple[bool, float, int]:
    return not plan.fits, plan.seconds, plan.peak
