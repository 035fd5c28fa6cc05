"""Takes logits and uniforms; gives drawn tokens and the log-probabilities of the very distribution they came from.

Letters: V vocabulary, [...] rows of any shape. A token of weight 0 is forbidden: no uniform draws it.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128  # lane width of a TPU; the padded vocabulary is a multiple of it, shard by shard
_LARGEST_BITS = 0x3F800000  # the bits of 1.0; those of a float in [0, 1] are ordered like the float itself


def keep_only(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits f32 [...,V] with every token outside `allowed` (bool, broadcastable to them) masked."""
    return jnp.where(allowed, logits, jnp.float32(-1e30))


def weights(logits: jax.Array, temperature: float, top_k: int | None = None, top_p: float | None = None) -> jax.Array:
    """The sampling distribution, unnormalised: logits f32 [...,V] -> f32 [...,V] in [0,1], 0 where truncated.

    softmax(logits / temperature), then the top_k most probable tokens (None: all), then the fewest most probable
    tokens that hold `top_p` of what is left (Holtzman et al. 2020, arXiv 1904.09751; None: all). Tokens as probable as
    the last one kept are kept too. Masked logits (-1e30) get weight 0. temperature > 0.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    w = jnp.exp((logits - top) / jnp.float32(temperature))
    if top_k is not None and top_k < w.shape[-1]:
        w = _truncate(w, lambda kept: jnp.sum(kept > 0, axis=-1, keepdims=True) >= top_k)
    if top_p is not None and top_p < 1:
        mass = jnp.float32(top_p) * jnp.sum(w, axis=-1, keepdims=True)
        w = _truncate(w, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= mass)
    return w


def draw(weights: jax.Array, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts the cumulative distribution: weights f32 [...,V], uniforms f32 [...] in [0,1) -> tokens i32 [...], the
    weights' totals f32 [...].

    The token is the first one of non-zero weight whose cumulative weight exceeds uniform x total, or, where rounding
    leaves none, the last of non-zero weight. In two levels: sums of blocks of 128 tokens, then inside one block; no
    cumulative sum of length V is made. V is a multiple of 128, or below it.
    """
    size = min(_BLOCK, weights.shape[-1])
    blocks = weights.reshape((*weights.shape[:-1], -1, size))
    sums = jnp.sum(blocks, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    total = ends[..., -1]
    target = uniforms * total
    block = _first_beyond(ends, sums, target)
    before = jnp.where(block > 0, _pick(ends, jnp.maximum(block - 1, 0)), jnp.float32(0))
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    place = _first_beyond(jnp.cumsum(inside, axis=-1), inside, target - before)
    return block * size + place, total


def drawn_log_probs(logits: jax.Array, temperature: float, tokens: jax.Array, totals: jax.Array) -> jax.Array:
    """log-probabilities f32 [...] of tokens i32 [...] that `draw` drew from `weights` of logits f32 [...,V] with these
    totals.

    From the logits, which so exist beside the weights: where nothing else reads them, XLA on a CPU makes one kernel of
    the product that gives them and of all up to the weights, which takes three times as long in bfloat16.
    """
    return (_pick(logits, tokens) - jnp.max(logits, axis=-1)) / jnp.float32(temperature) - jnp.log(totals)


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable token (the first of equals) and its log-probability where nothing else can be drawn, 0."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, jnp.zeros(tokens.shape, jnp.float32)


def _truncate(w: jax.Array, enough) -> jax.Array:
    """Keeps weights at or above the largest threshold at which what is kept is `enough`.

    The threshold is found by bisecting the floats' bits, which order like the floats: 30 passes of reductions, exact,
    without the sort, and without gathering a vocabulary that is sharded.
    """

    def halve(_, bounds):
        low, high = bounds  # kept at `low` is enough (or low is 0), at `high` it isn't
        middle = (low + high) // 2
        fits = enough(jnp.where(w >= _as_float(middle), w, jnp.float32(0)))
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low = jnp.zeros((*w.shape[:-1], 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, _LARGEST_BITS + 1)))
    return jnp.where(w >= _as_float(low), w, jnp.float32(0))


def _as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _first_beyond(ends: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """The first index of non-zero weight whose end is beyond the target or already the whole sum (so that rounding
    hands nothing to a tail too light to count), else the last of non-zero weight.

    A parallel prefix sum may rise, by rounding, where a weight is 0; asking for the weight too is what keeps a
    forbidden token from being drawn.
    """
    real = weights > 0
    beyond = real & ((ends > target[..., None]) | (ends >= ends[..., -1:]))
    first = jnp.argmax(beyond, axis=-1).astype(jnp.int32)
    last = weights.shape[-1] - 1 - jnp.argmax(real[..., ::-1], axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(beyond, axis=-1), first, last)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
