"""A model's config and its weights enter; the dtype that each frozen weight may be kept in leaves.

A frozen copy of a policy must compute what the policy itself computes: KL 0 and ratio 1 before the first update. So a
weight that nothing trains is kept in a narrower dtype only where the forward pass reads it in that dtype anyway; in
eight bits, which is asked for by name, the projections of the layers are not what the policy's own are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax.models.config import ModelConfig
from mpo_jax.ops.product import quantise
from mpo_jax.sharding import WEIGHT_AXES, map_weights, replicated
from mpo_jax.types import PyTree


def read_dtype(config: ModelConfig, name: str) -> str:
    """The dtype that the forward pass casts a weight to before anything else. name: as in the tables of `sharding`."""
    *parents, leaf = name.split("/")
    if leaf == "scale" or parents[-1].endswith("norm") or parents[0] == "head":
        return "float32"  # norms and the scalar head are computed in float32
    if leaf in ("embedding", "bias"):
        return config.activation_dtype
    return config.operand_dtype


def frozen_dtype(config: ModelConfig, name: str, dtype: str) -> jnp.dtype:
    """What a weight that nothing trains is kept in, where `dtype` is asked for: that, or a wider one it is read in.
    Where int8 is, what it is read from files in, before `frozen_copy`."""
    return jnp.promote_types("bfloat16" if dtype == "int8" else dtype, read_dtype(config, name))


def frozen_copy(config: ModelConfig, weights: PyTree, dtype: str) -> PyTree:
    """Weights, or their shapes, in the dtypes that they are kept in where nothing trains them. int8: the projections of
    the layers as `Int8`, on one device; embeddings, the output matrix, adapters and norms as under bfloat16."""

    def cast(name: str, leaf: Any) -> Any:
        if dtype == "int8" and name.startswith("params/layers/") and name.endswith("/kernel"):
            return _in_eight_bits(name, leaf)
        kept = frozen_dtype(config, name, dtype)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)
        return leaf.astype(kept)

    return map_weights(cast, weights)


def _in_eight_bits(name: str, leaf: Any) -> Any:
    axes = WEIGHT_AXES[name]
    outputs = ("embed",) if axes[-1] == "embed" else tuple(axis for axis in axes[1:] if axis != "embed")
    inputs = range(1, len(axes) - len(outputs))
    narrow = functools.partial(quantise, inputs=inputs)
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.jit(narrow)(leaf)
    where = None if leaf.sharding is None else replicated(leaf.sharding.mesh)
    return jax.tree.map(
        lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where), jax.eval_shape(narrow, leaf)
    )
