"""What a chip must do for one call enters; seconds, and the chip-hours of a stage, leave. Estimates, unlike the rest.

A call takes as long as the slowest of its three parts, work, memory traffic and collectives, each at the stated share
of the chip's peak: they are taken to overlap. `alone` tells what the compiled program does not overlap.
"""

import dataclasses
from typing import Any

import numpy as np

from mpo_jax.planning import arithmetic
from mpo_jax.planning.chips import Chip, Topology
from mpo_jax.planning.compile import Report
from mpo_jax.planning.hlo import BETWEEN_SLICES
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Extent, Program

EVALUATIONS = 10
"""Of a training, where eval_every is 0."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the data's rows, in tokens. pieces: i64 [rows, 1 + replies], of a sample of them. rows: that there are."""

    pieces: np.ndarray
    rows: int


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """pairs: records of the data. easy: share of them that the split finds easy, the rest being hard. utilisation: of
    the chip's peak. lengths: of the data; None: not known."""

    pairs: int = 92_858  # TL;DR's comparisons
    easy: float = 0.5
    utilisation: float = 0.4
    lengths: Lengths | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one call, by what takes them."""

    work: float
    memory: float
    collectives: float

    @property
    def total(self) -> float:
        return max(self.work, self.memory, self.collectives)

    @property
    def bound(self) -> str:
        """What the call waits for."""
        return max(("work", "memory", "collectives"), key=lambda name: getattr(self, name))


def seconds(report: Report, chip: Chip, assumptions: Assumptions) -> Seconds:
    """An all-reduce sends its bytes twice (it scatters, then gathers), the other collectives once. Those between slices
    go over the network, beside those over the links: the slower of the two counts."""
    share = assumptions.utilisation
    sent = _sent(report.collectives, chip, share)
    return Seconds(report.flops / (chip.flops * share), report.moved / (chip.bandwidth * share), sent)


def alone(report: Report, chip: Chip, assumptions: Assumptions) -> float:
    """Seconds of one call in which collectives travel and the chip computes nothing, by the compiled program. The
    estimate leaves them out wherever the other parts take longer than the collectives do."""
    return _sent(report.alone, chip, assumptions.utilisation)


def mfu(report: Report, chip: Chip, assumptions: Assumptions) -> float:
    """The model FLOPs' share of the chip's peak in a call, at most: with work, memory and links each at its full rate,
    so that the slowest of them alone takes time. 0.0 of a program without products."""
    fastest = seconds(report, chip, dataclasses.replace(assumptions, utilisation=1.0)).total
    return report.needed / (chip.flops * fastest) if report.needed else 0.0


def _sent(collectives: dict[str, int], chip: Chip, share: float) -> float:
    """Seconds of what is sent, bytes by kind."""
    links = network = 0.0
    for kind, size in collectives.items():
        sent = size * (2 if kind.startswith("all-reduce") else 1)
        if kind.endswith(BETWEEN_SLICES):
            network += sent / (chip.network * share)
        else:
            links += sent / (chip.links * share)
    return max(links, network)


_PASSES = {"none": 3, "dots": 3, "full": 4}
"""Passes through the products of a trunk in a training step, by remat: forward, twice backward, and forward again."""


def scaled(
    found: Seconds,
    before: Extent,
    after: Extent,
    mesh: Any,
    topology: Topology,
    assumptions: Assumptions,
    other_mesh: Any = None,
) -> Seconds:
    """The seconds of a call, each part as many times as large as the arithmetic says of another extent. other_mesh:
    that the other is on; None: the same."""
    other_mesh = mesh if other_mesh is None else other_mesh
    sent, then = (
        _sent(arithmetic.collectives(*each), topology.chip, assumptions.utilisation)
        for each in ((before, mesh), (after, other_mesh))
    )
    return Seconds(
        found.work * _work(after) / _work(before),
        found.memory * arithmetic.moved(after, other_mesh) / arithmetic.moved(before, mesh),
        found.collectives * then / sent if sent else then,
    )


def _work(extent: Extent) -> float:
    """Of one call, in passes of a token: only ratios of it count."""
    return tokens(extent) * (_PASSES[extent.model.remat] if extent.kind == "train" else 1)


def tokens(extent: Extent) -> int:
    """That one call takes through a trunk, those that it draws among them."""
    rows = extent.rows * extent.repeats * extent.batches
    return rows * (extent.length + (extent.window if extent.kind == "decode" else 0))


def calls(job: Job, program: Program, assumptions: Assumptions) -> float:
    """How often a stage runs a program."""
    settings = job.settings
    rows = kinds.of(settings).rows(job, assumptions.pairs, assumptions.easy)
    if program.per == "batch":
        # A stage may score more rows at a time than it samples prompts, and reply to several batches in one call.
        return max(1.0, rows / (program.extent.rows * program.extent.batches))
    steps = settings.steps or max(1.0, rows / settings.batch_size * settings.epochs)
    if program.per == "evaluation":
        times = steps / settings.eval_every if settings.eval_every else EVALUATIONS
        return times * settings.eval_batches
    return float(steps)
