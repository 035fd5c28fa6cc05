"""The records that travel between stages, and nothing else.

Letters: B rows (one prompt each), N responses to a prompt, T row length, P prompt slots and R response slots of a
rollout. Every record is a frozen pytree; `window` is static, so that each length bucket is traced once.
"""

import dataclasses
from typing import Any, dataclass_transform

import jax
import numpy as np

PyTree = Any
"""A nest of dicts, tuples and records whose leaves are arrays (or their shapes)."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def record(cls):
    """A frozen dataclass as pytree; fields marked `metadata={"static": True}` are part of its structure."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@record
class Batch:
    """Rows of one prompt and its N responses: `[prompt | response 0 | ... | response N-1 | padding]`.

    tokens, positions, segments: i32 [B,T]. segments: 0 padding, 1 prompt, 2 + n response n. Positions of every
    response continue from the prompt.
    id, prompt_id: i32 [B]. weight: f32 [B], 0 for rows that only fill a batch.
    window: no row holds response tokens in more than this many consecutive columns (the static count with which a
    bucket's response columns are gathered; N * R in slot form).
    ref_logps: f32 [B,2], summed reference log-probs of chosen and rejected, where they were computed beforehand.
    margin: f32 [B], how much better the annotator called the chosen reply, where the data says so (0 where it doesn't).
    label: f32 [B], 1 for a good first reply, 0 for a bad one, where replies are labelled.
    bucket: i32 [B], an index into BUCKETS or LEFT_OUT, where a split has divided the pairs.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    id: jax.Array
    prompt_id: jax.Array
    weight: jax.Array
    window: int = dataclasses.field(metadata={"static": True})
    ref_logps: jax.Array | None = None
    margin: jax.Array | None = None
    label: jax.Array | None = None
    bucket: jax.Array | None = None


@record
class Rollout:
    """Sampled responses. `batch` is in slot form: the prompt left-padded in columns [0,P), then N x R response slots.

    logps: f32 [B,N,R], of the distribution each token was drawn from; 0 beyond a response's end.
    finished: bool [B,N], whether the response ended with a stop token.
    """

    batch: Batch
    logps: jax.Array
    finished: jax.Array


@record
class Experience:
    """A rollout with all that the policy update reads.

    old_logps, ref_logps, values, advantages, returns: f32 [B,N,R]. score: f32 [B,N], the reward model's scalar.
    """

    rollout: Rollout
    old_logps: jax.Array
    ref_logps: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array
    score: jax.Array


@record
class TrainState:
    """All that a training stage must save to go on as if never stopped.

    step: i32 []. params: the trainable weights only. opt_state: optax's. key: a typed PRNG key.
    extra: a stage's own: scalars (KL coefficient), or arrays that lie as parameters do (a reference that moves).
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    key: jax.Array
    extra: PyTree = dataclasses.field(default_factory=dict)


@record
class GapTable:
    """Scored pairs, a row each. id, prompt_id: i32 [rows]. score_chosen, score_rejected, gap: f32 [rows], in the unit
    of the split's measure (gap = chosen - rejected; of margins and of ranks, which know no replies, rejected is 0).
    bucket: i8 [rows], an index into `BUCKETS`, or LEFT_OUT."""

    id: np.ndarray
    prompt_id: np.ndarray
    score_chosen: np.ndarray
    score_rejected: np.ndarray
    gap: np.ndarray
    bucket: np.ndarray


BUCKETS = ("easy", "hard", "flipped")
LEFT_OUT = -1
"""Stands for a bucket where a pair is in none of them."""
