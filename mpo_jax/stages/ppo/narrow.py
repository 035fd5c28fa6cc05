"""Experience enters, whose gradient is computed a microbatch at a time; microbatches of replies of like length leave,
each as narrow as its longest reply. Letters as in `types`.

The columns behind a reply's end add nothing to a loss, but they cost as much as all others.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mpo_jax.models.config import FLASH_MULTIPLE, ModelConfig
from mpo_jax.stages.gradients import Gradient
from mpo_jax.stages.ppo.experience import response_segments, response_slots, slots_of
from mpo_jax.types import Experience, PyTree, Rollout

_WIDTHS, _COLUMNS = 4, 32
"""Widths at most, each of which is one more program to compile; and columns of a row between two of them, at least."""


def widths(prompt: int, responses: int, length: int, multiple: int = 1) -> list[int]:
    """Response slots that a microbatch may have, up to `length`, R; rows of the others are a multiple of `multiple`."""
    unit = max(1, _COLUMNS // responses)
    apart, found = -(-length // (_WIDTHS * unit)) * unit, [0]
    for width in range(apart, length):
        if width >= found[-1] + apart and (prompt + responses * width) % multiple == 0:
            found.append(width)
    return [*found[1:], length]


def longest(rollout: Rollout) -> jax.Array:
    """i32 [B]: tokens of each row's longest response."""
    return jnp.max(jnp.sum((response_segments(rollout) > 0).astype(jnp.int32), axis=2), axis=1)


def alike(rows: jax.Array, lengths: jax.Array, parts: int) -> jax.Array:
    """The same rows i32 [b] in an order in which `gradients.split_batch` deals rows of like length to a part, the
    shortest to the first. lengths: i32 [B], of all rows of the rollout."""
    rows = rows[jnp.argsort(lengths[rows], stable=True)]
    return rows.reshape(parts, -1).T.reshape(-1)


def narrowed(experience: Experience, width: int) -> Experience:
    """The first `width` slots of every response."""
    rollout, batch = experience.rollout, experience.rollout.batch
    prompt, responses, _ = slots_of(rollout)

    def columns(x: jax.Array) -> jax.Array:
        """[B,P+N*R] -> [B,P+N*width]"""
        kept = response_slots(x, rollout)[:, :, :width].reshape(len(x), -1)
        return jnp.concatenate([x[:, :prompt], kept], axis=1)

    batch = dataclasses.replace(
        batch,
        tokens=columns(batch.tokens),
        positions=columns(batch.positions),
        segments=columns(batch.segments),
        window=responses * width,
    )
    rollout = dataclasses.replace(rollout, batch=batch, logps=rollout.logps[:, :, :width])
    read = ("old_logps", "ref_logps", "values", "advantages", "returns")
    return dataclasses.replace(
        experience, rollout=rollout, **{name: getattr(experience, name)[:, :, :width] for name in read}
    )


def in_widths(model: ModelConfig, gradient: Gradient) -> Gradient:
    """A gradient of experience, computed in as few response slots as its longest response needs."""
    multiple = FLASH_MULTIPLE if model.attention == "flash" else 1

    def narrow(params: PyTree, frozen: PyTree, experience: Experience, key: jax.Array):
        possible = widths(*slots_of(experience.rollout), multiple)
        shorter = jnp.max(longest(experience.rollout)) > jnp.array(possible[:-1], jnp.int32)

        def at(width: int):
            return lambda params, experience: gradient(params, frozen, narrowed(experience, width), key)

        return jax.lax.switch(jnp.sum(shorter), [at(width) for width in possible], params, experience)

    return narrow
