"""Takes positions and frequencies; gives rotated queries and keys (Su et al. 2021, arXiv 2104.09864).

The two halves of a head are the pairs, as Hugging Face checkpoints store them (not neighbouring dimensions).
"""

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.ops.rounding import rounded


def frequencies(dim: int, theta: float, linear_factor: float = 1.0) -> np.ndarray:
    """Radians per position: f32 [dim / 2]. linear_factor stretches the context (positions are divided by it)."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim) / linear_factor).astype(np.float32)


def llama3_frequencies(
    plain: np.ndarray, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> np.ndarray:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * np.pi / plain.astype(np.float64)
    blend = (original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (plain * (blend + (1 - blend) / factor)).astype(np.float32)


def angles(positions: jax.Array, inv_freq: np.ndarray, kept: bool = False) -> tuple[jax.Array, jax.Array]:
    """positions i32 [...] -> cos, sin f32 [..., dim / 2].

    kept: computed once, in a loop of two whose result XLA keeps. Unrolled layers want it on a CPU, where both are else
    fused into every rotation, and computed again for each head and layer; a TPU would pay for it in memory.
    """
    radians = positions.astype(jnp.float32)[..., None] * inv_freq.reshape((1,) * positions.ndim + (-1,))
    if not kept:
        return jnp.cos(radians), jnp.sin(radians)
    cos, sin = jax.lax.map(lambda is_sin: jnp.where(is_sin, jnp.sin(radians), jnp.cos(radians)), jnp.arange(2) == 1)
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., heads, head_dim], cos and sin f32 [..., dim / 2]: rotates the first `dim` of head_dim, in float32."""
    dim = 2 * cos.shape[-1]
    rotated, kept = x[..., :dim].astype(jnp.float32), x[..., dim:]
    first, second = jnp.split(rotated, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = rounded(turned, x.dtype)
    return jnp.concatenate([turned, kept], axis=-1) if kept.shape[-1] else turned
