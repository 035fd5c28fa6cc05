"""Takes a batch's segments and positions; gives masks, response columns and masked statistics.

A mask is True at real tokens. Letters: B rows, T row length, N responses, W response columns gathered from a row.
"""

import jax
import jax.numpy as jnp

PROMPT_SEGMENT = 1
FIRST_RESPONSE_SEGMENT = 2


def visible(positions: jax.Array, segments: jax.Array, window: jax.Array | int | None = None) -> jax.Array:
    """Which keys a query sees. positions, segments i32 [B,T] -> bool [B,T,T] (query, key).

    A key is visible if it is not later in the row, its segment is the prompt's or the query's own, and the difference
    of positions is below `window` (None: no limit). Padding (segment 0) is seen by nothing but itself, so that no
    softmax runs over an empty set.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))[None]
    allowed = causal & ((key == query) | (key == PROMPT_SEGMENT)) & (query > 0)
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return allowed | (jnp.eye(length, dtype=bool)[None] & (query == 0))


def response_columns(segments: jax.Array, window: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a row's response tokens are, and where each is predicted from.

    segments i32 [B,T] -> target_index, source_index i32 [B,W], segment i32 [B,W] with W = window. target_index runs
    over the W columns that begin at the row's first response column; segment is 0 where a column holds no response
    token. A response's first token is predicted from the prompt's last column, every other from the column before it.
    """
    length = segments.shape[1]
    is_response = segments >= FIRST_RESPONSE_SEGMENT
    first = jnp.argmax(is_response, axis=1).astype(jnp.int32)
    columns = first[:, None] + jnp.arange(window, dtype=jnp.int32)[None]
    target_index = jnp.minimum(columns, length - 1)
    segment = jnp.take_along_axis(segments, target_index, axis=1)
    in_response = is_response.any(axis=1)[:, None] & (columns < length) & (segment >= FIRST_RESPONSE_SEGMENT)
    segment = jnp.where(in_response, segment, 0)
    prompt_end = jnp.maximum(first - 1, 0)[:, None]
    before = jnp.maximum(target_index - 1, 0)
    continues = jnp.take_along_axis(segments, before, axis=1) == segment
    return target_index, jnp.where(continues, before, prompt_end), segment


def last_index(segments: jax.Array, responses: int) -> jax.Array:
    """The column of each response's last real token: segments i32 [B,T] -> i32 [B,N].

    An empty response gives the prompt's last column; an empty row gives 0.
    """
    length = segments.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)[None]

    def last_of(segment):
        return jnp.max(jnp.where(segments == segment, columns, -1), axis=1)

    prompt_end = jnp.maximum(last_of(PROMPT_SEGMENT), 0)
    ends = [last_of(FIRST_RESPONSE_SEGMENT + n) for n in range(responses)]
    return jnp.stack([jnp.where(end < 0, prompt_end, end) for end in ends], axis=1)


def by_response(values: jax.Array, segment: jax.Array, responses: int) -> jax.Array:
    """Sums over each response's tokens: values f32 [B,W], segment i32 [B,W] -> f32 [B,N]."""
    own = segment[:, :, None] == FIRST_RESPONSE_SEGMENT + jnp.arange(responses, dtype=segment.dtype)[None, None, :]
    return jnp.sum(jnp.where(own, values[:, :, None], jnp.float32(0)), axis=1)


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum where the mask is True; what lies beneath a False may be NaN or infinite."""
    return jnp.sum(jnp.where(mask, values, jnp.zeros((), values.dtype)))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean where the mask is True; 0 under an all-False mask. Divides by the sum of the mask, not by its size."""
    return masked_sum(values, mask) / jnp.maximum(jnp.sum(mask.astype(values.dtype)), 1)
