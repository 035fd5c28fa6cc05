"""A config, a topology and the stages' names enter; the report of every program of every stage leaves.

The base model need not be at hand: see `models.presets`. Meshes are the config's, over the topology's devices.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable

import jax
from etils import epath

from mpo_jax import graph, pipeline, settings, sharding
from mpo_jax.errors import InputError
from mpo_jax.models import attention, presets
from mpo_jax.models.config import ModelConfig
from mpo_jax.planning import compile as compiler
from mpo_jax.planning import estimate, lengths, storage
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.compile import Report
from mpo_jax.planning.estimate import Assumptions, Seconds
from mpo_jax.planning.known import Known
from mpo_jax.planning.storage import Storage
from mpo_jax.run import Run, StageMesh
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Program


@dataclasses.dataclass(frozen=True)
class Planned:
    """One program of a stage, its figures, the seconds of one call with the longest rows, its model FLOPs' share of the
    peak at most (see `estimate.mfu`), and how many calls the stage makes. least, most: of those seconds, what a call
    takes on average, see `lengths.shares`. alone: seconds of a call with collectives and no work, see
    `estimate.alone`."""

    report: Report
    seconds: Seconds
    mfu: float
    calls: float
    least: float = 1.0
    most: float = 1.0
    alone: float = 0.0

    @property
    def total_seconds(self) -> float:
        """Of all calls, at most."""
        return self.seconds.total * self.calls * self.most

    @property
    def least_seconds(self) -> float:
        return self.seconds.total * self.calls * self.least


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage's programs, by name, and what it writes to disk. mesh: the sizes of its own; {}: it has the run's."""

    programs: dict[str, Planned]
    chips: int
    storage: Storage
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return all(each.report.fits for each in self.programs.values())

    @property
    def peak(self) -> int:
        return max((each.report.peak for each in self.programs.values()), default=0)

    @property
    def seconds(self) -> float:
        return sum(each.total_seconds for each in self.programs.values())

    @property
    def mfu(self) -> float:
        """The model FLOPs' share of the peak, at most, over all calls with the longest rows."""
        took = {name: each.seconds.total * each.calls for name, each in self.programs.items()}
        return sum(self.programs[name].mfu * seconds for name, seconds in took.items()) / (sum(took.values()) or 1.0)

    @property
    def chip_hours(self) -> float:
        return self.chips * self.seconds / 3600

    @property
    def least_chip_hours(self) -> float:
        return self.chips * sum(each.least_seconds for each in self.programs.values()) / 3600

    @property
    def misfits(self) -> list[str]:
        return [name for name, each in self.programs.items() if not each.report.fits]


def jobs(config: Run, topology: Topology, only: Iterable[str] = ()) -> dict[str, Job]:
    """A job for each stage (or those of `only`), on its mesh over the topology. InputError for what can't be."""
    preset = presets.find(config.model.path)
    if not topology.compiled:
        config = _for_accelerator(config)
    mesh = run_mesh(config, topology)
    inputs = graph.connections(config)
    only = list(only)
    graph.needed(inputs, only)
    try:
        planned = {job.name: job for job in pipeline.plan_jobs(config, epath.Path("."), mesh, inputs, preset)}
    except InputError as error:  # a stage's own mesh
        raise InputError(f"{error} on {topology.name}; {_fitting(topology, preset.architecture)}") from error
    pipeline.check_jobs(planned.values(), functools.partial(meshes_that_work, topology=topology))
    return {name: job for name, job in planned.items() if not only or name in only}


def plan(
    job: Job,
    topology: Topology,
    assumptions: Assumptions,
    only: Iterable[str] = (),
    known: Known | None = None,
) -> StagePlan:
    """Compiles a stage's programs (or those of `only`). InputError where the mesh does not divide a batch.

    known: programs compiled before, which are not compiled again.
    """
    only = list(only)
    planned = {}
    with jax.set_mesh(job.mesh), meshes_that_work(job, topology):
        programs = kinds.of(job.settings).programs(job)
        for name, program in programs.items():
            if only and name not in only:
                continue
            if not topology.compiled:
                program = _on_gpu(program, job, topology)
            report = compiler.report(program, topology, job.mesh, known=known)
            each = estimate.seconds(report, topology.chip, assumptions)
            parts = lengths.shares(job, program, each, topology, assumptions)
            mfu = estimate.mfu(report, topology.chip, assumptions)
            alone = estimate.alone(report, topology.chip, assumptions)
            planned[name] = Planned(report, each, mfu, estimate.calls(job, program, assumptions), *parts, alone)
    own = {} if job.settings.mesh == StageMesh() else dict(job.mesh.shape)
    return StagePlan(planned, topology.size, storage.of_stage(job, programs, assumptions), own)


def run_mesh(config: Run, topology: Topology) -> jax.sharding.Mesh:
    """The mesh of all stages that have none of their own."""
    return make_mesh(config, topology, presets.find(config.model.path).architecture)


def make_mesh(config: Run, topology: Topology, model: ModelConfig) -> jax.sharding.Mesh:
    """The config's mesh over the topology. InputError, listing meshes that would work, where it does not divide it."""
    try:
        return sharding.make_mesh(**dict(config.mesh), devices=topology.devices)
    except InputError as error:
        raise InputError(f"{error} on {topology.name}; {_fitting(topology, model)}") from error


def _fitting(topology: Topology, model: ModelConfig) -> str:
    return _say(meshes(model, topology.size, slices=topology.slices))


def meshes(model: ModelConfig, devices: int, rows: int | None = None, slices: int = 1) -> list[dict[str, int]]:
    """The fsdp x tensor meshes over so many devices that divide the model's heads and batches of `rows`; data is one
    copy of the model for each slice."""
    fitting = []
    for tensor in (1, 2, 4, 8, 16):
        fsdp = devices // slices // tensor
        divides = devices // slices % tensor == 0 and model.heads % tensor == 0 and model.width % max(1, fsdp) == 0
        shared_heads = model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
        batches = rows is None or rows % max(1, slices * fsdp) == 0
        if divides and shared_heads and model.mlp_width % tensor == 0 and batches:
            fitting.append({"data": slices, "fsdp": fsdp, "tensor": tensor})
    return fitting


@contextlib.contextmanager
def meshes_that_work(job: Job, topology: Topology):
    """Adds to an error about the mesh which meshes would do."""
    try:
        yield
    except InputError as error:
        if "mesh" not in str(error):
            raise
        assert job.preset is not None
        rows = getattr(job.settings, "batch_size", None)
        fitting = meshes(job.preset.architecture, topology.size, rows, topology.slices)
        raise InputError(f"{error}; {_say(fitting)}") from error


def _say(fitting: list[dict[str, int]]) -> str:
    if not fitting:
        return "no mesh divides it; change batch_size or the topology"
    return "meshes that would work: " + "; ".join(
        ", ".join(f"{axis}={size}" for axis, size in mesh.items()) for mesh in fitting
    )


def _on_gpu(program: Program, job: Job, topology: Topology) -> Program:
    """The program with the attention that the arithmetic is to reckon with: what a GPU would choose, which this machine
    can't trace."""
    model = program.extent.model
    chosen = attention.choose(job.config.model.attention, model, "gpu", topology.size, topology.chip.capability)
    return dataclasses.replace(
        program, extent=dataclasses.replace(program.extent, model=dataclasses.replace(model, attention=chosen.backend))
    )


def _for_accelerator(config: Run) -> Run:
    """Without a compiler for it the arrays lie on CPU devices, whose own dtype would be float32."""
    keys = [key for key in ("dtype", "frozen_dtype") if getattr(config.model, key) == "auto"]
    return settings.replaced(config, {f"model.{key}": "bfloat16" for key in keys})
