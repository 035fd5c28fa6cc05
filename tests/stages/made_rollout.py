"""Lengths enter; a made-up Rollout of random tokens leaves."""

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.types import Batch, Rollout


def rollout(empty: np.ndarray, lens: np.ndarray, prompt: int, length: int) -> Rollout:
    """Prompts of `prompt` columns, of which so many are empty: i64 [B]; responses of `lens` tokens, i64 [B,N], in
    `length` slots. A row without a response has the weight 0."""
    random = np.random.default_rng(0)
    rows, responses = lens.shape
    before = np.arange(prompt)[None] >= empty[:, None]
    real = np.arange(length)[None, None] < lens[:, :, None]
    numbers = (2 + np.arange(responses))[None, :, None]
    segments = np.concatenate([before, (real * numbers).reshape(rows, -1)], axis=1)
    begin = before.sum(axis=1)[:, None, None]
    behind = np.broadcast_to(begin + np.arange(length), (rows, responses, length)).reshape(rows, -1)
    places = np.concatenate([np.cumsum(before, axis=1) - 1, behind], axis=1)
    ids = np.arange(rows, dtype=np.int32)
    batch = Batch(
        tokens=np.where(segments > 0, random.integers(1, 100, segments.shape), 0).astype(np.int32),
        positions=np.where(segments > 0, places, 0).astype(np.int32),
        segments=segments.astype(np.int32),
        id=ids,
        prompt_id=ids,
        weight=lens.any(axis=1).astype(np.float32),
        window=responses * length,
    )
    logps = np.zeros((rows, responses, length), np.float32)
    return jax.tree.map(jnp.asarray, Rollout(batch, logps, lens < length))
