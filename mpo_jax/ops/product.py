"""Activations and a weight enter; their product leaves, its operands in one dtype and its sums in float32.

XLA multiplies bfloat16 operands fast on a CPU with bfloat16 instructions only where the result is asked for in float32,
and a weight's gradient only where its left operand lies with the summed axis last; autodiff gives neither.
"""

import functools
import itertools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mpo_jax.ops.rounding import rounded
from mpo_jax.types import record

RECOMPUTED = "rematted_computation"
"""The name that JAX gives to what `jax.checkpoint` computes again, and we to what our own backward passes do: the plan
leaves it out of what a model needs."""

_FEW_ROWS = 256
_TILE = 32  # rows and columns of the blocks in which `_transposed` moves an operand

_CPUINFO = Path("/proc/cpuinfo")
_ISAS = ("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX")
"""What XLA may be held to on a CPU by `--xla_cpu_max_isa`, in order."""


@functools.cache
def fast_on_this_cpu() -> bool:
    """Whether this machine's CPU multiplies bfloat16 operands about twice as fast as float32: it has AVX512-BF16, and
    XLA_FLAGS does not keep XLA from it. As measured in docs/benchmarks.md; of other processors nothing is known."""
    held = re.search(r"xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if held and held[1].upper() in _ISAS[: _ISAS.index("AVX512_BF16")]:
        return False
    try:
        told = _CPUINFO.read_text()
    except OSError:  # not Linux
        return False
    return re.search(r"^flags\s.*\bavx512_bf16\b", told, re.MULTILINE) is not None


@record
class Int8:
    """A weight in eight bits: values i8 of the weight's own shape, times scale f32, which is 1 long along every input
    axis: one for each output ("per channel", Dettmers et al. 2022, arXiv 2208.07339, section 2.1)."""

    values: jax.Array
    scale: jax.Array

    def reshape(self, *shape: int) -> "Int8":
        """As a matrix whose outputs are its last axis."""
        return Int8(self.values.reshape(*shape), self.scale.reshape(-1))


def quantise(weight: jax.Array, inputs: Sequence[int]) -> Int8:
    """The nearest in eight bits, symmetric about 0. inputs: the axes that a product sums over. An output whose weights
    are all 0 has scale 0."""
    wide = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=tuple(inputs), keepdims=True) / 127
    return Int8(jnp.round(wide / jnp.where(scale > 0, scale, jnp.float32(1))).astype(jnp.int8), scale)


def product(
    x: jax.Array, weight: jax.Array | Int8, dtype: DTypeLike, result: DTypeLike | None = None, transposed: bool = False
) -> jax.Array:
    """x [..., K] times weight [K, N], both cast to `dtype` -> [..., N] in `result`, or else in x's own dtype.

    transposed: the weight is [N, K]. Where x is float32 and `dtype` bfloat16 ("mixed"), the result and both gradients
    are float32, from bfloat16 operands; otherwise it is the plain product, as accelerators want it. A weight in eight
    bits ([K, N], nothing trains it) is widened, which is exact, and its outputs are scaled.
    """
    if isinstance(weight, Int8):
        out = product(x, weight.values.astype(dtype), dtype, result)
        return rounded(out.astype(jnp.float32) * weight.scale.reshape((1,) * (out.ndim - 1) + (-1,)), out.dtype)
    if jnp.dtype(dtype) != x.dtype:
        out = _mixed(transposed, x.reshape(-1, x.shape[-1]), weight)
        return out.reshape(*x.shape[:-1], -1)
    axes = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, rounded(weight, dtype), axes, preferred_element_type=result)


def products(x: jax.Array, weights: Sequence[jax.Array | Int8], dtype: DTypeLike) -> list[jax.Array]:
    """`product` of one x [..., K] with several weights [K, N], each in x's dtype.

    A "mixed" x of few rows meets them side by side, as one matrix: such products are short beside what it takes to
    start them. Of many rows, that gains nothing.
    """
    rows = math.prod(x.shape[:-1])
    plain = [weight for weight in weights if not isinstance(weight, Int8)]
    if jnp.dtype(dtype) == x.dtype or rows > _FEW_ROWS or len(weights) == 1 or len(plain) < len(weights):
        return [product(x, weight, dtype) for weight in weights]
    ends = itertools.accumulate(weight.shape[1] for weight in plain[:-1])
    return jnp.split(product(x, jnp.concatenate(plain, axis=1), dtype), list(ends), axis=-1)


def over_rows(x: jax.Array, gradient: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x [M,K] and gradient [M,N], both cast to `dtype` and multiplied over M -> f32 [K,N], a weight's gradient."""
    if x.dtype == jnp.bfloat16:  # what accelerators compute in, which read either operand along any axis
        return einsum_in_float32("mk,mn->kn", x, gradient.astype(dtype))
    return _dot(_transpose(x.astype(dtype)), gradient.astype(dtype), (1, 0))


def einsum_in_float32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, f32.

    For products whose operands are summed over another axis than their last: in bfloat16 jaxlib 0.10.2 refuses some of
    them on a CPU at run time ("Unsupported element type for DotThunk"), so there they meet in float32.
    """
    multiply = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
    if x.dtype != jnp.bfloat16:
        return multiply(x, y)

    def widened(x, y):
        return multiply(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=widened, default=multiply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(transposed: bool, x: jax.Array, weight: jax.Array) -> jax.Array:
    """f32 [M,K], [K,N] or [N,K] -> f32 [M,N]."""
    return _dot(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), (1, 1 if transposed else 0))


def _forward(transposed, x, weight):
    x, narrow = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    like = jnp.zeros((0,), weight.dtype)  # what the weight's gradient has to be
    return _dot(x, narrow, (1, 1 if transposed else 0)), (x, narrow, like)


def _backward(transposed, kept, gradient):
    x, weight, like = kept
    gradient = gradient.astype(jnp.bfloat16)
    of_x = _dot(gradient, weight, (1, 0 if transposed else 1))
    left, right = (gradient, x) if transposed else (x, gradient)
    return of_x, _dot(_transpose(left), right, (1, 0)).astype(like.dtype)


_mixed.defvjp(_forward, _backward)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """f32: two matrices of one dtype multiplied over dimension contract[0] of `a` and contract[1] of `b`."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    out = jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
    # A transpose behind it would be folded into the product, and into a form that jaxlib 0.10.2 refuses at run time.
    return jax.lax.optimization_barrier(out)


def _transpose(x: jax.Array) -> jax.Array:
    """[M,K] -> [K,M], in blocks: XLA folds a plain transpose into the product, which then upcasts its operands."""
    rows, columns = x.shape
    if rows % _TILE or columns % _TILE:
        return x.T
    blocks = x.reshape(rows // _TILE, _TILE, columns // _TILE, _TILE)
    return blocks.transpose(2, 3, 0, 1).reshape(columns, rows)
