"""Arrays of rows and which rows are meant enter; rows taken out, put in and put back leave. No row changes its device.

Rows of a batch lie over the mesh's data and fsdp axes. They are cut here into as many groups as those axes have shards,
and rows are named within their group, [groups, k], so that what moves stays on the device where it lies.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mpo_jax.sharding import BATCH_AXES, axis_size, current_mesh
from mpo_jax.types import PyTree


def groups(*sizes: int) -> int:
    """Groups that rows of these numbers are cut into under the mesh of `jax.set_mesh`: 1 where it does not divide
    them all, as of a single prompt, or where there is none."""
    mesh = current_mesh()
    shards = 1 if mesh is None else axis_size(mesh, BATCH_AXES)
    return shards if all(size % shards == 0 for size in sizes) else 1


def grouped(x: jax.Array, groups: int) -> jax.Array:
    """[B,...] -> [groups, B / groups, ...]."""
    return over_rows(x.reshape(groups, -1, *x.shape[1:]))


def flat(x: jax.Array) -> jax.Array:
    """[groups, k, ...] -> [groups * k, ...]."""
    return over_rows(x.reshape(-1, *x.shape[2:]))


def take(tree: PyTree, which: jax.Array) -> PyTree:
    """Some rows of every array, [B,...] -> [groups * k, ...]; scalars as they are. which: i32 [groups,k], each within
    its group."""

    def of(x: jax.Array) -> jax.Array:
        pick = jax.vmap(lambda rows, places: rows.at[places].get(mode="clip"))
        return flat(pick(grouped(x, len(which)), which)) if x.ndim else x

    return jax.tree.map(of, tree)


def put(tree: PyTree, which: jax.Array, new: PyTree) -> PyTree:
    """Every array with the rows of `new` [groups * k, ...] at `which`; what is meant for places beyond the end of a
    group is left out, and scalars are the tree's own."""

    def of(x: jax.Array, rows: jax.Array) -> jax.Array:
        write = jax.vmap(lambda old, places, new: old.at[places].set(new, mode="drop"))
        return flat(write(grouped(x, len(which)), which, grouped(rows, len(which)))) if x.ndim else x

    return jax.tree.map(of, tree, new)


def per_group(rows: jax.Array, groups: int) -> jax.Array:
    """How many rows of each group are meant: bool [B] -> i32 [groups]."""
    return jnp.sum(grouped(rows, groups), axis=1, dtype=jnp.int32)


def first(rows: jax.Array, groups: int) -> jax.Array:
    """The places of each group, i32 [groups, B / groups]: those that are meant by bool [B] before the others, each in
    their own order."""
    return jnp.argsort(~grouped(rows, groups), axis=1, stable=True).astype(jnp.int32)


def over_rows(tree: PyTree) -> PyTree:
    """Arrays with their first axis over the mesh, where it divides them; how the other axes lie is left open."""
    mesh = current_mesh()
    shards = 1 if mesh is None else axis_size(mesh, BATCH_AXES)

    def of(x: jax.Array) -> jax.Array:
        if mesh is None or not x.ndim or x.shape[0] % shards:
            return x
        others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *others))

    return jax.tree.map(of, tree)
