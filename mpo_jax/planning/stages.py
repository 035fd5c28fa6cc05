"""A config, a topology and the stages' names enter; the report of every program of every stage leaves.

The base model need not be at hand: see `models.presets`. The mesh is the config's, over the topology's devices.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath

from mpo_jax import graph, sharding
from mpo_jax.errors import InputError
from mpo_jax.models import attention, presets
from mpo_jax.models.config import ModelConfig
from mpo_jax.planning import compile as compiler
from mpo_jax.planning import estimate
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.compile import Report
from mpo_jax.planning.estimate import Assumptions, Seconds
from mpo_jax.stages import programs
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.stages.programs import Program


@dataclasses.dataclass(frozen=True)
class Planned:
    """One program of a stage, its figures, the seconds of one call and how many calls the stage makes."""

    report: Report
    seconds: Seconds
    calls: float

    @property
    def total_seconds(self) -> float:
        return self.seconds.total * self.calls


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage's programs, by name."""

    programs: dict[str, Planned]
    chips: int

    @property
    def fits(self) -> bool:
        return all(each.report.fits for each in self.programs.values())

    @property
    def peak(self) -> int:
        return max((each.report.peak for each in self.programs.values()), default=0)

    @property
    def chip_hours(self) -> float:
        return self.chips * sum(each.total_seconds for each in self.programs.values()) / 3600

    @property
    def misfits(self) -> list[str]:
        return [name for name, each in self.programs.items() if not each.report.fits]


def jobs(config: Any, topology: Topology, only: Iterable[str] = ()) -> dict[str, Job]:
    """A job for each stage (or those of `only`), on the topology's mesh. InputError for what can't be."""
    preset = presets.find(config.model.path)
    if not topology.compiled:
        config = _for_accelerator(config)
    mesh = make_mesh(config, topology, preset.architecture)
    connections = graph.connections(config)
    only = list(only)
    for name in only:
        if name not in connections:
            raise InputError(f"--stages: no stage {name!r}; expected some of {', '.join(connections)}")
    folder = epath.Path(".")
    found = {}
    for name, inputs in connections.items():
        if only and name not in only:
            continue
        artifacts = {
            role: Artifact(
                sources[0][0],
                graph.BASE if sources[0][0] == graph.BASE else config.stages[sources[0][0]].kind,
                folder,
                sources[0][1],
            )
            for role, sources in inputs.items()
            if sources
        }
        found[name] = Job(name, config.stages[name], config, folder, folder, artifacts, mesh, preset)
    return found


def plan(job: Job, topology: Topology, assumptions: Assumptions, only: Iterable[str] = ()) -> StagePlan:
    """Compiles a stage's programs (or those of `only`). InputError where the mesh does not divide a batch."""
    only = list(only)
    found = {}
    with jax.set_mesh(job.mesh), _meshes_that_work(job, topology):
        for name, program in programs.programs(job).items():
            if only and name not in only:
                continue
            if not topology.compiled:
                program = _on_gpu(program, job, topology)
            report = compiler.report(program, topology, job.mesh)
            each = estimate.seconds(report, topology.chip, assumptions)
            found[name] = Planned(report, each, estimate.calls(job, program, assumptions))
    return StagePlan(found, topology.size)


def make_mesh(config: Any, topology: Topology, model: ModelConfig) -> jax.sharding.Mesh:
    """The config's mesh over the topology. InputError, listing meshes that would work, where it does not divide it."""
    try:
        return sharding.make_mesh(**config.mesh.to_dict(), devices=topology.devices)
    except InputError as error:
        raise InputError(f"{error} on {topology.name}; {_say(meshes(model, topology.size))}") from error


def meshes(model: ModelConfig, devices: int, rows: int | None = None) -> list[dict[str, int]]:
    """The fsdp x tensor meshes over so many devices that divide the model's heads and batches of `rows`."""
    found = []
    for tensor in (1, 2, 4, 8, 16):
        fsdp = devices // tensor
        divides = devices % tensor == 0 and model.heads % tensor == 0 and model.width % fsdp == 0
        shared_heads = model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
        if divides and shared_heads and model.mlp_width % tensor == 0 and (rows is None or rows % fsdp == 0):
            found.append({"data": 1, "fsdp": fsdp, "tensor": tensor})
    return found


@contextlib.contextmanager
def _meshes_that_work(job: Job, topology: Topology):
    try:
        yield
    except InputError as error:
        if "mesh" not in str(error):
            raise
        assert job.preset is not None
        found = meshes(job.preset.architecture, topology.size, job.settings.batch_size)
        raise InputError(f"stages.{job.name}: {error}; {_say(found)}") from error


def _say(found: list[dict[str, int]]) -> str:
    if not found:
        return "no mesh divides it; change batch_size or the topology"
    return "meshes that would work: " + "; ".join(
        ", ".join(f"{axis}={size}" for axis, size in mesh.items()) for mesh in found
    )


def _on_gpu(program: Program, job: Job, topology: Topology) -> Program:
    """The program with the attention that the arithmetic is to reckon with: what a GPU would choose, which this machine
    can't trace."""
    model = program.extent.model
    chosen = attention.choose(job.config.model.attention, model, "gpu", topology.size)
    return dataclasses.replace(
        program, extent=dataclasses.replace(program.extent, model=dataclasses.replace(model, attention=chosen.backend))
    )


def _for_accelerator(config: Any) -> Any:
    """Without a compiler for it the arrays lie on CPU devices, whose own dtype would be float32."""
    config = copy.deepcopy(config)
    for key in ("dtype", "frozen_dtype"):
        if config.model[key] == "auto":
            config.model[key] = "bfloat16"
    return config
