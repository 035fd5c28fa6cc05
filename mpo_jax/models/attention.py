"""Takes queries, keys and values; gives attended values, under the visibility rule of `ops.masks.visible`.

Letters: B rows, T row length, N responses, P prompt slots, R response slots, H heads, K key-value heads, D head_dim.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpo_jax.errors import InputError
from mpo_jax.models import flash
from mpo_jax.models.config import ATTENTION_SETTINGS, NO_WINDOW, ModelConfig
from mpo_jax.ops import masks
from mpo_jax.ops.product import RECOMPUTED, einsum_in_float32
from mpo_jax.ops.rounding import rounded
from mpo_jax.types import record

_F32 = jnp.float32
_MASKED = -1e30  # far below any logit, and finite: a fully masked row gives no NaN
_BLOCKS, _LANES = 8, 64  # blocks of queries at most, and what their sizes are multiples of


@record
class RowContext:
    """What attention over whole rows reads beside q, k, v. cos, sin: f32 [B,T,rope/2] or None.

    visible: bool [B,T,T] for each distinct window of the model (xla and cudnn; empty for flash).
    """

    cos: jax.Array | None
    sin: jax.Array | None
    positions: jax.Array
    segments: jax.Array
    visible: tuple[jax.Array, ...]
    slots: flash.Slots | None = dataclasses.field(default=None, metadata={"static": True})


@record
class LayerCache:
    """One layer's keys and values: of the prompt [B,K,P,D], and of each response's slots [B,K*N,R,D].

    Heads come first, and no axis is of length 1, as the products of a step read them; so no step moves a cache.
    """

    prompt_keys: jax.Array
    prompt_values: jax.Array
    keys: jax.Array
    values: jax.Array


@record
class StepContext:
    """What attention of one new token for each response reads. cos, sin: f32 [B,N,rope/2] or None.

    positions i32 [B,N] of the new tokens; prompt_positions, prompt_segments i32 [B,P]; cursor i32 [] and began i32 [B]
    as in `decoder.Cache`.
    """

    cos: jax.Array | None
    sin: jax.Array | None
    positions: jax.Array
    prompt_positions: jax.Array
    prompt_segments: jax.Array
    cursor: jax.Array
    began: jax.Array


class Choice(NamedTuple):
    """backend: what a ModelConfig's `attention` is to be. why: the reason, as a sentence without its full stop."""

    backend: str
    why: str


def choose(
    setting: str, config: ModelConfig, platform: str, devices: int = 1, capability: tuple[int, int] | None = None
) -> Choice:
    """The backend that a setting (`ATTENTION_SETTINGS`) means for a model on a platform (cpu, gpu or tpu).

    capability: of the GPU, where it is known. "auto" is cuDNN on one GPU where cuDNN can compute the model, and xla
    everywhere else; what is named is taken at its word, and `ModelConfig.check_attention` says where it can't be.
    InputError for an unknown setting.
    """
    if setting not in ATTENTION_SETTINGS:
        raise InputError(f"model.attention: {setting!r}; expected one of {list(ATTENTION_SETTINGS)}")
    if setting != "auto":
        return Choice(setting, f"model.attention={setting} asks for it")
    if platform != "gpu":
        return Choice("xla", f"cuDNN is not on {platform}")
    if devices > 1:
        return Choice("xla", "cuDNN's attention over several GPUs has not been tested")
    obstacle = config.cudnn_obstacle(capability)
    if obstacle is not None:
        return Choice("xla", f"cuDNN {obstacle}")
    return Choice("cudnn", "cuDNN can compute this model, and stores no logits")


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """Of a GPU, as (9, 0); None where the device has none or tells something else."""
    told = str(getattr(device, "compute_capability", ""))
    major, _, minor = told.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


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
    if config.attention == "cudnn":
        return flash.cudnn(config, q, k, v, mask)
    rows, length, heads, dim = q.shape
    by_head = q.reshape(rows, length, config.kv_heads, heads // config.kv_heads, dim).transpose(0, 2, 3, 1, 4)
    whole = context.slots is not None and context.slots.responses > 0  # prompts alone are never cut
    out = _attend(config.scale, config.attention_softcap, whole, by_head, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale: float, softcap: float | None, whole: bool, q, k, v, mask: jax.Array) -> jax.Array:
    """Attention whose mask is causal or less: q [B,K,G,T,D], k and v [B,K,T,D], mask bool [B,T,T] -> [B,K,G,T,D].

    whole: the last block, too, has a multiple of `_LANES` columns in the forward pass. XLA orders the sums of a smaller
    one in another way; so a row that is cut behind its last token keeps its bits.

    A block of queries meets the keys up to its end alone, and the backward pass computes the weights again: what is
    kept is linear in T. Nothing is kept that the forward pass alone would not write, such as the normalisers: XLA would
    order its sums in another way, and a policy's log-probs under a gradient would no longer be those of its frozen
    copy.

    On a CPU, XLA computes products of many small matrices on one core, unless it can fuse them with a sum or a maximum
    over their last axis, and it fuses no selection: so masks are added, and all arrays have four axes.
    """
    return _attend_forward(scale, softcap, whole, q, k, v, mask)[0]


def _attend_forward(scale, softcap, whole, q, k, v, mask):
    kept, length, outs = (q, k, v, mask), q.shape[3], []
    if whole:
        more = (0, -length % _LANES)
        q, k, v = (jnp.pad(x, (*((0, 0),) * (x.ndim - 2), more, (0, 0))) for x in (q, k, v))
        mask = jnp.pad(mask, ((0, 0), more, more))
    for begin, end in _blocks(q.shape[3]):
        queries, bias = _queries(q, begin, end), _bias(mask, q.shape[2], begin, end)
        logits = _capped(_einsum("bkqd,bksd->bkqs", queries, k[:, :, :end]) * scale, softcap) + bias
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _einsum("bkqs,bksd->bkqd", rounded(weights, v.dtype), v[:, :, :end])
        outs.append(rounded(out / total, q.dtype))
    return _joined(outs, q.shape)[:, :, :, :length], kept


def _attend_backward(scale, softcap, whole, kept, of_out):
    q, k, v, mask = kept
    of_q, of_k, of_v = [], jnp.zeros(k.shape, _F32), jnp.zeros(v.shape, _F32)
    for begin, end in _blocks(q.shape[3]):
        queries, cotangent = _queries(q, begin, end), _queries(of_out, begin, end)
        with jax.named_scope(RECOMPUTED):
            products = _einsum("bkqd,bksd->bkqs", queries, k[:, :, :end])
        capped = _capped(products * scale, softcap)
        weights = jax.nn.softmax(capped + _bias(mask, q.shape[2], begin, end), axis=-1)
        of_weights = _einsum("bkqd,bksd->bkqs", cotangent, v[:, :, :end])
        of_logits = weights * (of_weights - jnp.sum(weights * of_weights, axis=-1, keepdims=True)) * scale
        if softcap is not None:
            of_logits *= 1 - (capped / softcap) ** 2
        of_logits, weights = of_logits.astype(k.dtype), weights.astype(v.dtype)
        of_q.append(_einsum("bkqs,bksd->bkqd", of_logits, k[:, :, :end]))
        of_k = of_k.at[:, :, :end].add(einsum_in_float32("bkqs,bkqd->bksd", of_logits, queries))
        of_v = of_v.at[:, :, :end].add(einsum_in_float32("bkqs,bkqd->bksd", weights, cotangent))
    return _joined(of_q, q.shape).astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)

_einsum = functools.partial(jnp.einsum, preferred_element_type=_F32)


def _queries(x: jax.Array, begin: int, end: int) -> jax.Array:
    """A block of [B,K,G,T,D], as [B,K,G*t,D]."""
    return x[:, :, :, begin:end].reshape(*x.shape[:2], -1, x.shape[-1])


def _joined(blocks: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The reverse: the blocks of an array of this shape."""
    return jnp.concatenate([block.reshape(*shape[:3], -1, shape[4]) for block in blocks], axis=3)


def _bias(mask: jax.Array, groups: int, begin: int, end: int) -> jax.Array:
    """What a block's logits get: f32 [B,1,G*t,end], 0 where a query sees a key; elsewhere so far below 0 that nothing
    of the logit is left."""
    return jnp.where(jnp.tile(mask[:, None, begin:end, :end], (1, 1, groups, 1)), jnp.float32(0), _MASKED)


def _blocks(length: int) -> list[tuple[int, int]]:
    """At most `_BLOCKS` ranges of columns, in lanes' multiples: more would save little and make the program longer."""
    size = -(-length // (_BLOCKS * _LANES)) * _LANES
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _softmax(config: ModelConfig, logits: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, _capped(logits, config.attention_softcap), _MASKED), axis=-1)


def attend_step(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, kind: int, context: StepContext, cache: LayerCache
) -> tuple[jax.Array, LayerCache]:
    """One new token for each response: q [B,N,H,D], k and v [B,N,K,D] -> [B,N,H,D] and the cache with k, v written.

    Each response sees its prompt and itself, so the cost is linear in N.
    """
    rows, responses, heads, dim = q.shape
    groups = heads // config.kv_heads
    start = (0, 0, context.cursor % cache.keys.shape[2], 0)

    def by_head(x):
        """[B,N,K,D] -> [B,K*N,1,D]"""
        return x.swapaxes(1, 2).reshape(rows, -1, 1, dim)

    cache = dataclasses.replace(
        cache,
        keys=jax.lax.dynamic_update_slice(cache.keys, by_head(k), start),
        values=jax.lax.dynamic_update_slice(cache.values, by_head(v), start),
    )
    prompt_len, slots = cache.prompt_keys.shape[2], cache.keys.shape[2]
    shape = (rows, config.kv_heads, responses, groups)
    queries = q.reshape(rows, responses, config.kv_heads, groups, dim).swapaxes(1, 2)
    on_prompt = jnp.einsum("bkngd,bkpd->bkngp", queries, cache.prompt_keys, preferred_element_type=_F32)
    queries = queries.reshape(rows, -1, groups, dim)
    on_own = jnp.einsum("bhgd,bhrd->bhgr", queries, cache.keys, preferred_element_type=_F32).reshape(*shape, slots)
    prompt_mask, own_mask = _step_masks(context, window_kinds(config)[kind], slots)
    mask = jnp.concatenate([prompt_mask, jnp.broadcast_to(own_mask, (rows, responses, slots))], axis=-1)
    logits = jnp.concatenate([on_prompt, on_own], axis=-1) * config.scale
    weights = _softmax(config, logits, mask[:, None, :, None]).astype(v.dtype)
    out = jnp.einsum("bkngp,bkpd->bkngd", weights[..., :prompt_len], cache.prompt_values)
    on_slots = weights[..., prompt_len:].reshape(rows, -1, groups, slots)
    out += jnp.einsum("bhgr,bhrd->bhgd", on_slots, cache.values).reshape(out.shape)
    return out.swapaxes(1, 2).reshape(q.shape), cache


def _step_masks(context: StepContext, window: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """bool [B,N,P] and [B,1,R]: which prompt columns and which own slots the new token sees."""
    behind = context.positions[:, :, None] - context.prompt_positions[:, None, :]
    prompt_mask = (context.prompt_segments == masks.PROMPT_SEGMENT)[:, None, :] & (behind < window)
    slots_behind = (context.cursor - jnp.arange(slots, dtype=jnp.int32)[None, None, :]) % slots
    steps = (context.cursor - context.began)[:, None, None]
    return prompt_mask, (slots_behind <= steps) & (slots_behind < window)
