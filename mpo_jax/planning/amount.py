"""A stage enters; how much there is to compute in it leaves, by arithmetic alone: what stages are compared by before
they have run.
"""

import jax

from mpo_jax.models.config import ModelConfig
from mpo_jax.planning import arithmetic, estimate
from mpo_jax.planning.estimate import Assumptions
from mpo_jax.stages import kinds
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Extent

_PASSES = {"train": 3, "forward": 1, "decode": 1}
"""Passes of a token through the model's weights: forward, and twice as much backward."""


def of_stage(job: Job, pairs: int) -> float | None:
    """Multiplications of tokens with weights in all that a stage computes on the devices, rows taken to be as long as
    the data's limits allow, and half of all pairs to be easy; None of a stage that computes nothing there. pairs:
    records of the data. Nothing is compiled, read or written."""
    with jax.set_mesh(job.mesh):
        programs = kinds.of(job.settings).programs(job).values()
    assumptions = Assumptions(pairs=pairs)
    return sum(estimate.calls(job, each, assumptions) * _of_call(each.extent) for each in programs) or None


def _of_call(extent: Extent) -> float:
    return _PASSES[extent.kind] * estimate.tokens(extent) * extent.trunks * _weights(extent.model)


def _weights(model: ModelConfig) -> int:
    """Of the matrices that every token is multiplied with."""
    return model.layers * arithmetic.layer_weights(model) + model.vocab_size * model.width
