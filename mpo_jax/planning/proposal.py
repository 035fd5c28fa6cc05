"""A stage that does not fit enters; the first change that makes it fit leaves, found by trying.

Changes that leave the results alone come first (remat, microbatch, mesh), then optimizer state of fewer bytes, then
adapters instead of full fine-tuning, then more chips. What arithmetic alone rules out is not compiled.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from mpo_jax import settings
from mpo_jax.errors import InputError
from mpo_jax.models import presets
from mpo_jax.planning import compile as compiler
from mpo_jax.planning import stages
from mpo_jax.planning.chips import Topology, larger, topology
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.planning.known import Known
from mpo_jax.planning.stages import StagePlan
from mpo_jax.run import Run, mesh_of
from mpo_jax.sharding import BATCH_AXES, axis_size, divided
from mpo_jax.stages import kinds
from mpo_jax.stages.base import Training


@dataclasses.dataclass(frozen=True)
class Proposal:
    """flags: to be added to the command line. plan: of the stage with them; None: nothing tried fits."""

    flags: tuple[str, ...]
    plan: StagePlan | None
    tried: int


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings by their dotted names, on a topology."""

    settings: dict[str, Any]
    topology: str

    def flags(self, given: str) -> tuple[str, ...]:
        found = [f"--config.{name}={value}" for name, value in self.settings.items()]
        return tuple(found + ([f"--topology={self.topology}"] if self.topology != given else []))


def propose(
    config: Run,
    name: str,
    misfits: Iterable[str],
    place: Topology,
    assumptions: Assumptions,
    known: Known | None = None,
) -> Proposal:
    """The first of `changes` under which the programs that did not fit do, and then all of the stage's."""
    tried = 0
    misfits = list(misfits)
    for change in changes(config, name, place):
        where = place if change.topology == place.name else topology(change.topology)
        try:
            changed = settings.replaced(config, change.settings)
            job = stages.jobs(changed, where, [name])[name]
            if not _may_fit(job, where):
                continue
            tried += 1
            if stages.plan(job, where, assumptions, misfits, known).fits:
                whole = stages.plan(job, where, assumptions, known=known)
                if whole.fits:
                    return Proposal(change.flags(place.name), whole, tried)
        except InputError:  # a mesh that does not divide something
            continue
    return Proposal((), None, tried)


def changes(config: Run, name: str, place: Topology) -> Iterator[Change]:
    """What to try, each with what came before it where that helps."""
    stage = config.stages[name]
    model = presets.find(config.model.path).architecture
    kept: dict[str, Any] = {}
    if isinstance(stage, Training):
        if (stage.remat or config.model.remat) != "full":
            kept[f"stages.{name}.remat"] = "full"
            yield Change(dict(kept), place.name)
        mesh = divided(stages.run_mesh(config, place), mesh_of(config, stage))
        smallest = axis_size(mesh, BATCH_AXES)
        rows = stage.microbatch or stage.batch_size
        while rows % 2 == 0 and rows // 2 >= smallest:
            rows //= 2
            yield Change(kept | {f"stages.{name}.microbatch": rows}, place.name)
        if rows != (stage.microbatch or stage.batch_size):
            kept[f"stages.{name}.microbatch"] = rows
    for mesh_ in stages.meshes(model, place.size, stage.batch_size, place.slices):
        if mesh_ != mesh_of(config, stage):
            sizes = {f"stages.{name}.mesh.{axis}": size for axis, size in mesh_.items()}
            yield Change(_with_rows(kept, name, mesh_) | sizes, place.name)
    if isinstance(stage, Training) and stage.moments != "factored":
        yield Change(kept | {f"stages.{name}.moments": "factored"}, place.name)
    if not config.model.lora.rank:
        yield Change(kept | {"model.lora.rank": 16}, place.name)
    for slice_ in larger(place):
        yield Change(dict(kept), slice_)


def _with_rows(kept: dict[str, Any], name: str, mesh: dict[str, int]) -> dict[str, Any]:
    """Microbatches are multiples of the mesh's data x fsdp."""
    key = f"stages.{name}.microbatch"
    shards = mesh["data"] * mesh["fsdp"]
    return kept | {key: -(-kept[key] // shards) * shards} if key in kept else kept


def _may_fit(job: Any, place: Topology) -> bool:
    """Whether arguments alone leave room."""
    with jax.set_mesh(job.mesh):
        held = [sum(compiler.memory_held(program)) for program in kinds.of(job.settings).programs(job).values()]
    return max(held, default=0) < place.chip.memory
