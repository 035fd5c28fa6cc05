"""Takes numbers or tokens under a mask; gives their moments, correlation and repetition.

The last two betray a policy that games its reward: by length, or by saying the same again.
"""

import jax
import jax.numpy as jnp

from mpo_jax.ops import masks, shapes


def repeated_ngram_share(tokens: jax.Array, mask: jax.Array, n: int = 4) -> jax.Array:
    """The share of a response's n-grams that stood in it before: tokens i32 [B,N,R], mask bool [B,N,R] -> f32 [B,N].

    1 - distinct / all, over the n-grams of n consecutive real tokens; 0 in a response of fewer than n tokens.
    """
    length = shapes.check("i32[B,N,R] bool[B,N,R]", tokens=tokens, mask=mask)["R"]
    if n < 1:
        raise ValueError(f"n is {n}; expected 1 or more")
    places = length - n + 1
    if places < 1:
        return jnp.zeros(tokens.shape[:2], jnp.float32)
    grams = [tokens[:, :, k : k + places] for k in range(n)]
    real = jnp.all(jnp.stack([mask[:, :, k : k + places] for k in range(n)]), axis=0)
    # Sorted, equal n-grams are neighbours (exact, R log R); places outside the mask go last.
    absent, *grams = jax.lax.sort([(~real).astype(jnp.int32), *grams], dimension=2, num_keys=n + 1)
    same = jnp.all(jnp.stack([gram[:, :, 1:] == gram[:, :, :-1] for gram in grams]), axis=0)
    repeated = jnp.sum((same & (absent[:, :, 1:] == 0)).astype(jnp.float32), axis=2)
    return repeated / jnp.maximum(jnp.sum(real.astype(jnp.float32), axis=2), 1)


def moments(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and population variance (divided by n) under the mask, f32 [] each: values f32 [...], mask bool [...].

    Equal values have a variance of exactly 0: the second look at the mean takes off the first one's rounding, which
    would pass for a spread.
    """
    shapes.check("f32[...] bool[...]", values=values, mask=mask)
    mean = masks.masked_mean(values, mask)
    mean = mean + masks.masked_mean(values - mean, mask)
    return mean, masks.masked_mean(jnp.square(values - mean), mask)


def correlation(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Pearson's correlation under the mask, f32 [], 0 where either side doesn't vary: x, y f32 [...], mask bool [...].

    Of response lengths and scores: a policy that learns to please by length alone drives it up.
    """
    shapes.check("f32[...] f32[...] bool[...]", x=x, y=y, mask=mask)
    (x_mean, x_variance), (y_mean, y_variance) = moments(x, mask), moments(y, mask)
    together = masks.masked_mean((x - x_mean) * (y - y_mean), mask)
    spread = jnp.sqrt(x_variance) * jnp.sqrt(y_variance)
    return jnp.where(spread > 0, together / jnp.where(spread > 0, spread, 1), jnp.float32(0))
