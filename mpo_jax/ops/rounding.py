"""Values enter; the same values rounded to a narrower dtype leave, whatever the compiler would rather do.

XLA may leave out a cast to bfloat16 and back (`xla_allow_excess_precision`, its default), in one program and not in
another: then a policy's log-probs differ between the forward pass alone and the one that gradients are taken of.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in `dtype`, and rounded to it also where the compiler drops casts. The gradient passes as that of a cast."""
    if x.dtype == jnp.dtype(dtype) or jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    return _to_bfloat16(x)


@jax.custom_jvp
def _to_bfloat16(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


@_to_bfloat16.defjvp
def _(primals, tangents):
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def in_float32(function, *values: jax.Array) -> jax.Array:
    """An elementwise function of values of one dtype, computed in float32 and rounded to theirs once.

    Its inputs are all that the backward pass keeps.
    """
    (dtype,) = {x.dtype for x in values}
    if dtype != jnp.bfloat16:
        return function(*values)

    def wide(*values):
        return rounded(function(*(x.astype(jnp.float32) for x in values)), dtype)

    return jax.checkpoint(wide, prevent_cse=False)(*values)
