"""A stage whose programs were planned, and settings it might have instead, enter; what those would take leaves.

By arithmetic, so that little needs to be compiled: of each part of a program's seconds, and of its temporaries, the
arithmetic says how many times as large they would be, and the plan's own figure is multiplied by that.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mpo_jax import settings
from mpo_jax.planning import arithmetic, estimate
from mpo_jax.planning import compile as compiler
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.stages import Planned, StagePlan
from mpo_jax.stages import kinds
from mpo_jax.stages.base import Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Program, Programs


@dataclasses.dataclass(frozen=True)
class Reckoned:
    """changes: settings of the stage, by name. seconds: of the stage. peak: bytes on one chip. new: programs that
    differ from those that were planned, so many at most are to be compiled."""

    changes: dict[str, Any]
    seconds: float
    peak: int
    new: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stage would run. programs: its own there, with the settings that the config has."""

    job: Job
    programs: Programs

    @classmethod
    def of(cls, job: Job) -> "Place":
        """Builds the programs; nothing is traced or compiled."""
        with jax.set_mesh(job.mesh):
            return cls(job, kinds.of(job.settings).programs(job))


def reckon(
    now: StagePlan, at: Place, there: Place, changes: Mapping[str, Any], topology: Topology, assumptions: Assumptions
) -> Reckoned:
    """What a stage, planned as `now` at a place, would take elsewhere with other settings.

    InputError for settings that can't be, or that the mesh does not divide."""
    job = dataclasses.replace(there.job, settings=settings.replaced(there.job.settings, changes))
    programs = _changed(there, job)
    found = {
        name: _program(now.programs[name], at, at.programs[name], job, program, topology, assumptions)
        for name, program in programs.items()
        if name in now.programs
    }
    moved = at.job.mesh != job.mesh
    new = sum(moved or programs[name].extent != at.programs[name].extent for name in found)
    return Reckoned(
        dict(changes), sum(seconds for seconds, _ in found.values()), max(peak for _, peak in found.values()), new
    )


def _changed(there: Place, job: Job) -> Programs:
    """A training's programs keep their arguments whatever is computed at a time: it is not worth making them anew."""
    if job.settings == there.job.settings:
        return there.programs
    if not isinstance(job.settings, Training) or getattr(job.settings, "score_batch", 0) != getattr(
        there.job.settings, "score_batch", 0
    ):
        return Place.of(job).programs
    remat = job.settings.remat or job.config.model.remat
    rows = job.settings.microbatch or job.settings.update_rows
    return {
        name: dataclasses.replace(program, extent=program.extent.at(rows, remat))
        if program.extent.kind == "train"
        else program
        for name, program in there.programs.items()
    }


def _program(
    now: Planned, at: Place, program: Program, job: Job, other: Program, topology: Topology, assumptions: Assumptions
) -> tuple[float, int]:
    """Seconds of all calls, and bytes at the peak."""
    before, after = program.extent, other.extent
    seconds = estimate.scaled(now.seconds, before, after, at.job.mesh, topology, assumptions, job.mesh)
    temporaries = arithmetic.temporaries(after, job.mesh) / arithmetic.temporaries(before, at.job.mesh)
    held = sum(compiler.memory_held(other))
    calls = estimate.calls(job, other, assumptions)
    return seconds.total * calls * now.most, held + round(now.report.temporaries * temporaries)
