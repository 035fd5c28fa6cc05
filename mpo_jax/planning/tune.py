"""Stages that were planned enter; the mesh and the settings with which they take the fewest seconds leave.

Only what leaves numbers alone is tried: the mesh, microbatch, remat, score_batch, and how many prompts a stage samples
at a time that trains nothing. Every such setting is reckoned by arithmetic first; of the best on the best meshes a
bounded number is compiled, and what is proposed was compiled and fits.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.models import presets
from mpo_jax.planning import reckon, stages
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.known import Known
from mpo_jax.planning.reckon import Place, Reckoned
from mpo_jax.planning.stages import StagePlan
from mpo_jax.run import Run
from mpo_jax.sharding import BATCH_AXES, MESH_AXES, axis_size
from mpo_jax.stages import kinds
from mpo_jax.stages.base import Sampling, Training
from mpo_jax.stages.job import Job

MESHES = 3
"""Meshes whose programs are compiled, at most, the present one among them."""
TRIES = 3
"""Settings of one group of a stage on one mesh that are compiled, at most: the best by arithmetic."""
COMPILES = 60
"""Programs that are compiled, unless the caller says another number."""
_ROOM = 1.25  # what arithmetic says needs so many times a chip's memory is not compiled
_REMATS = ("none", "dots", "full")
_TIMES = (2, 4, 8)  # rows scored or sampled at a time, by those that the stage has

Sizes = tuple[int, ...]
"""Of a mesh's axes, in their order."""
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A stage on a mesh with settings of its own, compiled. changes: by name. plan: of the stage with them."""

    changes: dict[str, Any]
    plan: StagePlan


@dataclasses.dataclass(frozen=True)
class Tuned:
    """mesh: that all stages together take the fewest seconds on, of those on which each was compiled and fits.
    now: the present one. stages: name -> mesh -> the best that was compiled. before: name -> the plan as it was.
    reckoned: settings, by arithmetic. compiled: programs, now. complete: nothing was left out for want of compiles."""

    mesh: Sizes
    now: Sizes
    stages: dict[str, dict[Sizes, Tried]]
    before: dict[str, StagePlan]
    reckoned: int
    compiled: int
    complete: bool

    def flags(self, name: str, mesh: Sizes) -> tuple[str, ...]:
        """What a stage's best settings on a mesh are on the command line."""
        return tuple(f"--config.stages.{name}.{key}={value}" for key, value in self.stages[name][mesh].changes.items())

    @property
    def mesh_flags(self) -> tuple[str, ...]:
        """What the mesh is on the command line, where it is another."""
        changed = zip(MESH_AXES, self.now, self.mesh, strict=True)
        return tuple(f"--config.mesh.{axis}={size}" for axis, now, size in changed if size != now)

    def best_mesh(self, name: str) -> Sizes:
        """The mesh that would be best for a stage alone, of those that were compiled."""
        found = self.stages[name]
        return min(found, key=lambda mesh: _cost(found[mesh].plan))

    def seconds(self, mesh: Sizes) -> float:
        """Of all stages, one after the other, on a mesh on which each was compiled."""
        return sum(found[mesh].plan.seconds for found in self.stages.values())


@dataclasses.dataclass(frozen=True)
class _Search:
    """A stage on one mesh. groups: the settings of each group that may fit, the best by arithmetic first. reckoned: how
    many there were."""

    name: str
    sizes: Sizes
    config: Run
    groups: list[list[Reckoned]]
    reckoned: int

    @property
    def seconds(self) -> float:
        """The best, by arithmetic."""
        return min(group[0].seconds for group in self.groups)


def tune(
    config: Run,
    before: Mapping[str, StagePlan],
    place: Topology,
    assumptions: Assumptions,
    known: Known,
    compiles: int = COMPILES,
    say: Say = lambda line: None,
) -> Tuned:
    """The fastest of what fits; among equally fast ones what needs the least memory.

    before: the plans of the stages as the config has them, all of which fit. known: programs that were compiled before.
    compiles: that may be made, at most, beside those; what would need more is left out.
    say: is told how many that may become before the first, and every trial.
    """
    before = {name: plan for name, plan in before.items() if plan.programs}
    now = _sizes(next(iter(stages.jobs(config, place, before).values())))
    searches = list(_searches(config, before, place, assumptions, now))
    kept = _meshes(searches, now, len(before))
    chosen = [each for each in searches if each.sizes in kept]
    worth = sum(reckoned.new for each in chosen for group in each.groups for reckoned in group[:TRIES])
    say(
        f"tuning {len(before)} stages on {len({each.sizes for each in searches})} meshes: "
        f"{sum(each.reckoned for each in searches)} settings reckoned by arithmetic; at most {min(worth, compiles)} "
        f"programs are to be compiled for the best on {_meshes_line(kept)}"
    )
    budget = _Budget(known, compiles)
    found: dict[str, dict[Sizes, Tried]] = {name: {now: Tried({}, plan)} for name, plan in before.items()}
    # The present mesh first, and on each the stages that take longest: what is cut off by the budget matters least.
    order = {sizes: index for index, sizes in enumerate(kept)}
    for each in sorted(chosen, key=lambda each: (order[each.sizes], -before[each.name].seconds)):
        start = found[each.name].get(each.sizes)
        if start is None and not _promises(each, chosen, found, now):
            continue
        best = _try(each, start, place, assumptions, budget, say)
        if best is not None:
            found[each.name][each.sizes] = best
    whole = [sizes for sizes in kept if all(_fits(tried.get(sizes)) for tried in found.values())]
    mesh = min(whole, key=lambda sizes: sum(tried[sizes].plan.seconds for tried in found.values()), default=now)
    return Tuned(
        mesh,
        now,
        found,
        before,
        sum(each.reckoned for each in searches),
        known.compiles - budget.began,
        not budget.refused,
    )


def _promises(search: _Search, chosen: list[_Search], found: dict[str, dict[Sizes, Tried]], now: Sizes) -> bool:
    """Whether, by arithmetic, another mesh is faster than the present one was found to be: for the stage alone, or
    for all stages together."""
    there = sum(each.seconds for each in chosen if each.sizes == search.sizes)
    here = sum(tried[now].plan.seconds for tried in found.values())
    return search.seconds < found[search.name][now].plan.seconds or there < here


class _Budget:
    """Compiles that are left. refused: whether something was not tried for want of them."""

    def __init__(self, known: Known, compiles: int):
        self.known, self.compiles, self.began, self.refused = known, compiles, known.compiles, False

    def allows(self, programs: int) -> bool:
        left = self.known.compiles - self.began + programs <= self.compiles
        self.refused |= not left
        return left


def _try(
    search: _Search, best: Tried | None, place: Topology, assumptions: Assumptions, budget: _Budget, say: Say
) -> Tried | None:
    """The best of what is compiled of a search: each group with the best of the groups before it."""
    for group in search.groups:
        fixed = best.changes if best is not None and best.plan.fits else {}
        for reckoned in group[:TRIES]:
            if best is not None and best.plan.fits and reckoned.seconds >= best.plan.seconds:
                break
            if not budget.allows(reckoned.new):
                continue
            changes = fixed | reckoned.changes
            names = {f"stages.{search.name}.{key}": value for key, value in changes.items()}
            try:
                job = stages.jobs(settings.replaced(search.config, names), place, [search.name])[search.name]
                planned = stages.plan(job, place, assumptions, known=budget.known)
            except InputError:  # rows that the mesh does not divide
                continue
            say(_trial_line(search, changes, reckoned, planned))
            if best is None or _cost(planned) < _cost(best.plan):
                best = Tried(changes, planned)
    return best


def _trial_line(search: _Search, changes: Mapping[str, Any], reckoned: Reckoned, plan: StagePlan) -> str:
    with_ = " ".join(f"{key}={value}" for key, value in changes.items()) or "the settings that it has"
    told = f"{plan.seconds:,.0f} s (by arithmetic {reckoned.seconds:,.0f})" if plan.fits else "does not fit"
    return f"    {search.name} on {mesh_name(search.sizes)} with {with_}: {told}"


# By arithmetic --------------------------------------------------------------------------------------------------------


def _searches(
    config: Run, before: Mapping[str, StagePlan], place: Topology, assumptions: Assumptions, now: Sizes
) -> Iterator[_Search]:
    """Every stage on every mesh that can hold it."""
    present = {name: Place.of(job) for name, job in stages.jobs(config, place, before).items()}
    model = presets.find(config.model.path).architecture
    sizes = [tuple(mesh[axis] for axis in MESH_AXES) for mesh in stages.meshes(model, place.size, None, place.slices)]
    for each in [now, *(one for one in sizes if one != now)]:
        there = settings.replaced(config, {f"mesh.{axis}": size for axis, size in zip(MESH_AXES, each, strict=True)})
        try:
            jobs = stages.jobs(there, place, before)
            places = {name: present[name] if each == now else Place.of(job) for name, job in jobs.items()}
        except InputError:  # a batch that this mesh does not divide
            continue
        for name, spot in places.items():
            yield _search(name, each, there, before[name], present[name], spot, place, assumptions)


def _search(
    name: str,
    sizes: Sizes,
    config: Run,
    before: StagePlan,
    present: Place,
    there: Place,
    place: Topology,
    assumptions: Assumptions,
) -> _Search:
    """What is worth a try of one stage on one mesh; elsewhere than now the settings that it has are a try, too."""
    groups, reckoned = [], 0
    for index, group in enumerate(choices(there.job, assumptions)):
        found = []
        for changes in [{}, *group] if there is not present and not index else group:
            try:
                found.append(reckon.reckon(before, present, there, changes, place, assumptions))
            except InputError:  # rows that the mesh does not divide
                continue
        reckoned += len(found)
        found = [each for each in found if each.peak <= _ROOM * place.chip.memory]
        if found:
            groups.append(sorted(found, key=lambda each: (each.seconds, each.peak)))
    return _Search(name, sizes, config, groups, reckoned)


def choices(job: Job, assumptions: Assumptions) -> list[list[dict[str, Any]]]:
    """What a stage may be set to instead, group by group: changes of its settings, those of a group tried one by one.

    A stage that trains keeps its batch_size. One that only samples draws the same replies in any."""
    stage = job.settings
    groups: list[list[dict[str, Any]]] = [[]]
    if isinstance(stage, Training):
        shards = axis_size(job.mesh, BATCH_AXES)
        halves = itertools.takewhile(
            lambda rows: rows >= shards and stage.update_rows % rows == 0,
            (stage.update_rows >> power for power in range(1, stage.update_rows.bit_length())),
        )
        has = {"microbatch": stage.microbatch, "remat": stage.remat or job.config.model.remat}
        pairs = [dict(zip(has, values, strict=True)) for values in itertools.product((0, *halves), _REMATS)]
        groups = [[{key: value for key, value in each.items() if value != has[key]} for each in pairs if each != has]]
    elif isinstance(stage, Sampling):
        rows = kinds.of(stage).rows(job, assumptions.pairs, assumptions.easy)
        sampled = [times * getattr(stage, "batch_size", 0) for times in _TIMES]
        groups = [[{"batch_size": each} for each in sampled if 0 < each <= rows]]
    if "score_batch" in type(stage).model_fields:
        scored = [times * stage.batch_size for times in _TIMES]
        groups.append([{"score_batch": each} for each in scored if each != stage.score_batch])
    return groups


def _meshes(searches: list[_Search], now: Sizes, count: int) -> list[Sizes]:
    """Those worth compiling for: the present one, and the best by arithmetic for all stages together."""
    totals: dict[Sizes, list[float]] = {}
    for each in searches:
        if each.groups:
            totals.setdefault(each.sizes, []).append(each.seconds)
    whole = {sizes: sum(seconds) for sizes, seconds in totals.items() if len(seconds) == count and sizes != now}
    return [now, *sorted(whole, key=lambda sizes: whole[sizes])[: MESHES - 1]]


def mesh_name(sizes: Sizes) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))


def _meshes_line(kept: list[Sizes]) -> str:
    return "; ".join(mesh_name(sizes) for sizes in kept)


def _sizes(job: Job) -> Sizes:
    return tuple(job.mesh.shape[axis] for axis in MESH_AXES)


def _fits(tried: Tried | None) -> bool:
    return tried is not None and tried.plan.fits


def _cost(plan: StagePlan) -> tuple[bool, float, int]:
    return not plan.fits, plan.seconds, plan.peak
