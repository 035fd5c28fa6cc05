"""Pairs of a split enter; a second loss that PPO takes on them in every update leaves, with the batch of each step.

So that what the easy pairs taught is not unlearned on the hard prompts. InstructGPT mixes pretraining gradients in
likewise (Ouyang et al. 2022, arXiv 2203.02155, eq. 2: PPO-ptx).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from mpo_jax import scoring
from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses, preferences
from mpo_jax.settings import Amount, Positive, Section, role, setting
from mpo_jax.stages import buckets, gradients, reference, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs
from mpo_jax.stages.sft import nll
from mpo_jax.types import Batch, PyTree

DEFAULT_BETA = 0.1


class Replay(Section):
    """A loss on pairs beside that on samples."""

    replay: str = role(PAIRS, "", "pairs for a second loss in every update, such as split/easy; empty: no second loss")
    replay_loss: Literal["sft", "dpo"] = setting(
        "sft", "the second loss: SFT on the chosen replies, or DPO on the pairs with the stage's own reference"
    )
    replay_coefficient: Amount = setting(0.1, "coefficient of the second loss; the default is our choice")
    replay_beta: Positive = setting(DEFAULT_BETA, "beta of the second loss, if replay_loss=dpo")

    @pydantic.model_validator(mode="after")
    def _replayed(self):
        if self.replay_beta != DEFAULT_BETA and self.replay_loss != "dpo":
            raise declared.wrong(
                "replay_beta", f"{self.replay_beta:g}, but replay_loss={self.replay_loss} does not read it"
            )
        if self.replay_loss != "sft" and not self.replay:
            raise declared.wrong(
                "replay", f"empty, but replay_loss is {self.replay_loss}; name pairs, such as split/easy"
            )
        return self


@dataclasses.dataclass(frozen=True)
class Second:
    """loss: of a batch of pairs, by {"policy"} and {"base"}. coefficient: beside PPO's loss."""

    loss: gradients.Loss
    coefficient: float

    def gradient(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, microbatches: int):
        """coefficient * the policy's gradient of the mean loss, and that mean."""
        own = {"policy": params["policy"]}
        grads, total, weight, _ = gradients.accumulate(
            gradients.gradient(self.loss), own, frozen, batch, key, microbatches
        )
        weight = jnp.maximum(weight, 1e-8)
        return jax.tree.map(lambda g: self.coefficient * g / weight, grads["policy"]), total / weight


def second_loss(model: ModelConfig, settings: Replay) -> Second | None:
    """The second loss of the settings; None where nothing is replayed."""
    if not settings.replay:
        return None

    def dpo(out: scoring.ResponseLogps, batch: Batch) -> losses.Loss:
        known: Any = batch.ref_logps
        logps = out.seq_logps(2)
        return preferences.dpo(logps[:, 0], logps[:, 1], known[:, 0], known[:, 1], batch.weight, settings.replay_beta)

    of_rows = dpo if settings.replay_loss == "dpo" else nll

    def loss(params: PyTree, frozen: PyTree, batch: Batch, key) -> losses.Loss:
        return scoring.response_loss(model, frozen["base"] | params["policy"], batch, of_rows)

    return Second(loss, settings.replay_coefficient)


def batch_shapes(job: Job[Any]) -> tuple[Batch, ...]:
    """What the update reads beside its rollout: a batch of pairs, where some are replayed."""
    settings = job.settings
    if not settings.replay:
        return ()
    made_by = shapes.made_by_stage(job, "replay")
    if settings.replay_loss == "sft":
        return (shapes.replies(job, settings.batch_size, made_by),)
    return (shapes.pairs(job, settings.batch_size, made_by, ref_logps=True),)


def programs(job: Job[Any], model: ModelConfig) -> Programs:
    """The reference's log-probs of the pairs, which are computed once, before the first step."""
    if not job.settings.replay or job.settings.replay_loss == "sft":
        return {}
    unread = shapes.pairs(job, job.settings.batch_size, shapes.made_by_stage(job, "replay"))
    weights = jobs.abstract_base(job, model) | shapes.frozen_weights(job, model)
    return {"replay_reference": rows.logps_program(job, model, weights, unread, 2)}


def reference_logps(job: Job[Any], compiled: Programs, base: PyTree, pairs: Encoded) -> np.ndarray:
    """The reference's log-probs of pairs, f32 [pairs,2]."""
    return reference.logps(job, compiled["replay_reference"], base, [pairs])[0]


def loader(job: Job[Any], read: Callable[[Encoded], np.ndarray]) -> Loader | None:
    """The pairs' batches, as many rows as prompts, in one shape: every other would compile the update again. read:
    gives the reference's log-probs of pairs, for a loss that has a reference."""
    settings = job.settings
    if not settings.replay:
        return None
    pairs, logps = buckets.pairs(job.inputs["replay"]), None
    if settings.replay_loss == "sft":
        pairs = buckets.chosen(pairs)
    else:
        logps = read(pairs)
    return jobs.loader(job, pairs, settings.batch_size, max_length=None, max_buckets=1, ref_logps=logps)
