"""Takes queries, keys and values; gives attended values, under the visibility rule of `ops.masks.visible`.

Letters: B rows, T row length, N responses, P prompt slots, R response slots, H heads, K key-value heads, D head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mpo_jax.models import flash
from mpo_jax.models.config import NO_WINDOW, ModelConfig
from mpo_jax.ops import masks
from mpo_jax.types import record

_MASKED = -1e30  # far below any logit, and finite: a fully masked row gives no NaN


@record
class RowContext:
    """What attention over whole rows reads beside q, k, v. cos, sin: f32 [B,T,rope/2] or None.

    visible: bool [B,T,T] for each distinct window of the model (xla backend; empty for flash).
    """

    cos: jax.Array | None
    sin: jax.Array | None
    positions: jax.Array
    segments: jax.Array
    visible: tuple[jax.Array, ...]
    slots: flash.Slots | None = dataclasses.field(default=None, metadata={"static": True})


@record
class LayerCache:
    """One layer's keys and values: of the prompt [B,K,P,D], and of each response's slots [B,K,N,R,D].

    Heads come first, as the products of a step read them; so no step moves a cache.
    """

    prompt_keys: jax.Array
    prompt_values: jax.Array
    keys: jax.Array
    values: jax.Array


@record
class StepContext:
    """What attention of one new token for each response reads. cos, sin: f32 [B,N,rope/2] or None.

    positions i32 [B,N] of the new tokens; prompt_positions, prompt_segments i32 [B,P]; cursor i32 [], the response
    slot they are written to.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    positions: jax.Array
    prompt_positions: jax.Array
    prompt_segments: jax.Array
    cursor: jax.Array


def window_kinds(config: ModelConfig) -> tuple[int, ...]:
    """The distinct windows of a model's layers; a layer's kind is an index into them."""
    return tuple(sorted(set(config.windows))) if config.windows is not None else (NO_WINDOW,)


def layer_kinds(config: ModelConfig) -> list[int]:
    kinds = window_kinds(config)
    return [kinds.index(window) for window in config.windows or (NO_WINDOW,) * config.layers]


def row_masks(config: ModelConfig, positions: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
    """One [B,T,T] mask for each kind of layer, built once for all layers; none where the backend masks by itself."""
    if config.attention == "flash":
        return ()
    return tuple(
        masks.visible(positions, segments, None if window == NO_WINDOW else window) for window in window_kinds(config)
    )


def attend_rows(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, kind: jax.Array, context: RowContext
) -> jax.Array:
    """q [B,T,H,D], k and v [B,T,K,D] -> [B,T,H,D]. kind: i32 [], which of the model's windows this layer has."""
    if config.attention == "flash":
        branches = [
            lambda q, k, v, window=window: flash.attend(
                config,
                q,
                k,
                v,
                context.positions,
                context.segments,
                None if window == NO_WINDOW else window,
                context.slots,
            )
            for window in window_kinds(config)
        ]
        return branches[0](q, k, v) if len(branches) == 1 else jax.lax.switch(kind, branches, q, k, v)
    mask = context.visible[0]
    if len(context.visible) > 1:
        mask = jnp.stack(context.visible)[kind]
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=config.scale)
    return _soft_capped(config, q, k, v, mask)


def _soft_capped(config: ModelConfig, q, k, v, mask) -> jax.Array:
    rows, length, heads, dim = q.shape
    grouped = q.reshape(rows, length, config.kv_heads, heads // config.kv_heads, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * config.scale
    weights = _softmax(config, logits, mask[:, None, None]).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def _softmax(config: ModelConfig, logits: jax.Array, mask: jax.Array) -> jax.Array:
    if config.attention_softcap is not None:
        logits = config.attention_softcap * jnp.tanh(logits / config.attention_softcap)
    return jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1)


def attend_step(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, kind: int, context: StepContext, cache: LayerCache
) -> tuple[jax.Array, LayerCache]:
    """One new token for each response: q [B,N,H,D], k and v [B,N,K,D] -> [B,N,H,D] and the cache with k, v written.

    Each response sees its prompt and itself, so the cost is linear in N.
    """
    rows, responses, heads, dim = q.shape
    start = (0, 0, 0, context.cursor, 0)
    cache = dataclasses.replace(
        cache,
        keys=jax.lax.dynamic_update_slice(cache.keys, k.swapaxes(1, 2)[:, :, :, None], start),
        values=jax.lax.dynamic_update_slice(cache.values, v.swapaxes(1, 2)[:, :, :, None], start),
    )
    grouped = q.reshape(rows, responses, config.kv_heads, heads // config.kv_heads, dim).swapaxes(1, 2)
    on_prompt = jnp.einsum("bkngd,bkpd->bkngp", grouped, cache.prompt_keys, preferred_element_type=jnp.float32)
    on_own = jnp.einsum("bkngd,bknrd->bkngr", grouped, cache.keys, preferred_element_type=jnp.float32)
    prompt_mask, own_mask = _step_masks(context, window_kinds(config)[kind], cache.keys.shape[3])
    mask = jnp.concatenate([prompt_mask, jnp.broadcast_to(own_mask, (rows, responses, own_mask.shape[2]))], axis=-1)
    logits = jnp.concatenate([on_prompt, on_own], axis=-1) * config.scale
    weights = _softmax(config, logits, mask[:, None, :, None]).astype(v.dtype)
    prompt_len = on_prompt.shape[-1]
    out = jnp.einsum("bkngp,bkpd->bkngd", weights[..., :prompt_len], cache.prompt_values)
    out += jnp.einsum("bkngr,bknrd->bkngd", weights[..., prompt_len:], cache.values)
    return out.swapaxes(1, 2).reshape(q.shape), cache


def _step_masks(context: StepContext, window: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """bool [B,N,P] and [1,1,R]: which prompt columns and which own slots the new token sees."""
    behind = context.positions[:, :, None] - context.prompt_positions[:, None, :]
    prompt_mask = (context.prompt_segments == masks.PROMPT_SEGMENT)[:, None, :] & (behind < window)
    slots_behind = context.cursor - jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    return prompt_mask, (slots_behind >= 0) & (slots_behind < window)
