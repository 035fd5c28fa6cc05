"""A stage's job and its programs enter; the bytes that it writes to the workdir leave: at rest, and at their peak."""

import dataclasses
from collections.abc import Iterable

import jax

from mpo_jax.planning.estimate import Assumptions
from mpo_jax.stages import job as jobs
from mpo_jax.stages import kinds
from mpo_jax.stages.base import PolicyTraining, Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs
from mpo_jax.types import PyTree, TrainState

_TOKEN = 4
"""Bytes of a token: an id in encoded rows, or a word's letters in a line of replies."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes in the workdir. weights: what the stage leaves. states: of its checkpoints while it trains, one more than
    are kept, since the oldest goes when the new one is whole, each with the best weights it names. rows: encoded rows
    and replies, at most: every one as long as data.max_length. snapshots: a policy's weights on the way."""

    weights: int
    states: int
    rows: int
    snapshots: int = 0

    @property
    def rest(self) -> int:
        """When the stage is done, and its states are gone."""
        return self.weights + self.rows + self.snapshots

    @property
    def peak(self) -> int:
        """The final weights are written when no checkpoint is on its way any more."""
        return self.states + self.rows + self.snapshots


def of_stage(job: Job, programs: Programs, assumptions: Assumptions) -> Storage:
    """programs: all of the stage's; their arguments tell what is trained."""
    rows = round(kinds.of(job.settings).rows(job, assumptions.pairs, assumptions.easy) * job.config.data.max_length)
    arguments = [argument for program in programs.values() for argument in program.arguments]
    state = next((each for each in arguments if isinstance(each, TrainState)), None)
    if state is None or not isinstance(job.settings, Training):
        return Storage(0, 0, rows * _TOKEN)
    weights, kept = _bytes(state.params), 0
    if isinstance(job.settings, PolicyTraining) and job.settings.snapshots:
        kept = job.settings.snapshots * _bytes(jobs.abstract_weights(jobs.model(job), job.mesh))
    return Storage(weights, (job.settings.keep + 1) * (_bytes(state) + weights), rows * _TOKEN, kept)


def peak(stages: Iterable[Storage]) -> int:
    """Of a graph whose stages run one after the other: what those before have left, and the stage at work."""
    left = most = 0
    for each in stages:
        most, left = max(most, left + each.peak), left + each.rest
    return most


def _bytes(tree: PyTree) -> int:
    """Of all arrays, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
