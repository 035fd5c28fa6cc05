"""What a chip must do for one call enters; seconds, and the chip-hours of a stage, leave. Estimates, unlike the rest.

A call takes as long as the slowest of its three parts, work, memory traffic and collectives, each at the stated share
of the chip's peak: they are taken to overlap.
"""

import dataclasses

from mpo_jax.planning.chips import Chip
from mpo_jax.planning.compile import Report
from mpo_jax.planning.hlo import BETWEEN_SLICES
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Program

EVALUATIONS = 10
"""Of a training, where eval_every is 0."""


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """pairs: records of the data. easy: share of them that the split finds easy, the rest being hard. utilisation: of
    the chip's peak."""

    pairs: int = 92_858  # TL;DR's comparisons
    easy: float = 0.5
    utilisation: float = 0.4


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
    links = network = 0.0
    for kind, size in report.collectives.items():
        sent = size * (2 if kind.startswith("all-reduce") else 1)
        if kind.endswith(BETWEEN_SLICES):
            network += sent / (chip.network * share)
        else:
            links += sent / (chip.links * share)
    return Seconds(report.flops / (chip.flops * share), report.moved / (chip.bandwidth * share), max(links, network))


def calls(job: Job, program: Program, assumptions: Assumptions) -> float:
    """How often a stage runs a program."""
    settings = job.settings
    batches = kinds.of(settings).rows(job, assumptions.pairs, assumptions.easy) / settings.batch_size
    if program.per == "batch":
        return max(1.0, batches)
    steps = settings.steps or max(1.0, batches * settings.epochs)
    if program.per == "evaluation":
        times = steps / settings.eval_every if settings.eval_every else EVALUATIONS
        return times * settings.eval_batches
    return float(steps)
