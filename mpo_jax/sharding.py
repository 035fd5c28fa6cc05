"""Takes mesh sizes and parameter names; gives the mesh, the sharding of every weight, and activation constraints.

Two exact-match tables say it all: parameter name -> logical axes, logical axis -> mesh axes. An unknown name is an
error, never a replicated default.
"""

import collections
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mpo_jax.errors import InputError
from mpo_jax.ops.product import Int8
from mpo_jax.types import PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "head_dim": None,
    "rank": None,
    "positions": None,
    "norm": None,
    "one": None,
}

_PROJECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attn/q": (("embed",), ("heads", "head_dim")),
    "attn/k": (("embed",), ("kv_heads", "head_dim")),
    "attn/v": (("embed",), ("kv_heads", "head_dim")),
    "attn/o": (("heads", "head_dim"), ("embed",)),
    "mlp/gate": (("embed",), ("mlp",)),
    "mlp/up": (("embed",), ("mlp",)),
    "mlp/down": (("mlp",), ("embed",)),
}
_LAYER_NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")


def _weight_axes() -> dict[str, tuple[str, ...]]:
    table = {
        "params/embed/embedding": ("vocab", "embed"),
        "params/lm_head/kernel": ("vocab", "embed"),
        "params/positions/embedding": ("positions", "embed"),
        "params/final_norm/scale": ("norm",),
        "params/final_norm/bias": ("norm",),
        "params/layers/attn/q_norm/scale": ("layers", "head_dim"),
        "params/layers/attn/k_norm/scale": ("layers", "head_dim"),
        "head/kernel": ("embed", "one"),
    }
    for norm in _LAYER_NORMS:
        table[f"params/layers/{norm}/scale"] = ("layers", "norm")
        table[f"params/layers/{norm}/bias"] = ("layers", "norm")
    for name, (inputs, outputs) in _PROJECTIONS.items():
        table[f"params/layers/{name}/kernel"] = ("layers", *inputs, *outputs)
        # A bias is small and is added to an activation: sharded like that activation, or replicated.
        table[f"params/layers/{name}/bias"] = ("layers", *("norm" if axis == "embed" else axis for axis in outputs))
        table[f"lora/layers/{name}/a"] = ("layers", *inputs, "rank")
        table[f"lora/layers/{name}/b"] = ("layers", "rank", *outputs)
    return table


WEIGHT_AXES = _weight_axes()


def _devices() -> list[jax.Device]:
    """All of this run. InputError where JAX has none of the platform that it is told of."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        told = os.environ.get("JAX_PLATFORMS", "")
        why = (str(error).strip().split("\n") or [""])[0] or "it says no more"
        raise InputError(f"JAX finds no device (JAX_PLATFORMS={told!r}): {why}") from error


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with Auto axes (data, fsdp, tensor). One size may be -1: whatever the devices leave.

    Over several TPU slices `data` goes over the network between them, and fsdp and tensor stay within a slice. Raises
    InputError where the sizes don't multiply to the number of devices, or the slices don't divide `data`.
    """
    devices = _devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh: sizes {dict(zip(MESH_AXES, sizes, strict=True))}; expected positive, at most one -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh: {dict(zip(MESH_AXES, sizes, strict=True))} needs {math.prod(sizes)} devices; found {len(devices)}"
        )
    types = (AxisType.Auto,) * 3
    if slices(devices) > 1:
        return Mesh(over_slices(sizes, devices), MESH_AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # JAX gives each axis whole rings of the chips' torus, and 8 x 2 has none on 4 x 4
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, MESH_AXES, axis_types=types)


def divided(mesh: Mesh, sizes: Mapping[str, int]) -> Mesh:
    """The devices of a mesh, divided another way: axis -> its size, as `make_mesh` takes them."""
    return make_mesh(**sizes, devices=list(mesh.devices.flat))


def slices(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices lie in; 1 where a device tells of none."""
    return len({getattr(device, "slice_index", None) for device in devices if device.platform == "tpu"}) or 1


def over_slices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices of several slices as [data, fsdp, tensor], `data` slice by slice. InputError where that can't be."""
    counts = collections.Counter(device.slice_index for device in devices)
    if len(set(counts.values())) > 1:
        raise InputError(f"mesh: slices of {sorted(counts.values())} devices; expected slices of one size")
    data, *within = sizes
    if data % len(counts):
        raise InputError(
            f"mesh.data: {data} on {len(counts)} slices; expected a multiple of {len(counts)}, or -1: fsdp and tensor "
            "stay within a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // len(counts), *within), (len(counts), 1, 1), devices, allow_split_physical_axes=True
    )


def weight_name(path) -> str:
    """The name of a leaf in a weights tree, as the tables spell it: "params/layers/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def weight_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of one weight. Raises InputError for unknown names and dimensions that don't divide."""
    if name not in WEIGHT_AXES:
        raise InputError(f"weight {name!r} is not in the sharding table")
    axes = WEIGHT_AXES[name]
    if len(axes) != len(shape):
        raise InputError(f"weight {name!r} has shape {shape}; expected {len(axes)} axes {axes}")
    return PartitionSpec(*(_mesh_axis(name, axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def _mesh_axis(name: str, axis: str, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    mesh_axis = LOGICAL_TO_MESH[axis]
    if mesh_axis is None:
        return None
    shards = axis_size(mesh, mesh_axis)
    if axis == "kv_heads" and size < shards:
        return None  # fewer key-value heads than shards: each shard holds them all
    if size % shards:
        raise InputError(f"weight {name!r}: its {axis} dimension of {size} is not divided by mesh {mesh_axis}={shards}")
    return mesh_axis


def axis_size(mesh, axes: str | tuple[str, ...]) -> int:
    """How many shards the named mesh axes make together."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def tree_shardings(weights: PyTree, mesh: Mesh) -> PyTree:
    """NamedShardings of a weights tree ({"params", "lora", "head"} collections of arrays or shapes)."""
    return map_weights(lambda name, leaf: NamedSharding(mesh, weight_spec(name, leaf.shape, mesh)), weights)


def map_weights(function: Callable, weights: PyTree) -> PyTree:
    """`function(name, leaf)` over a weights tree, with names as in the tables. What is in eight bits stays so."""

    def by_name(path, leaf):
        return leaf if isinstance(leaf, Int8) else function(weight_name(path), leaf)

    return jax.tree_util.tree_map_with_path(by_name, weights, is_leaf=lambda leaf: isinstance(leaf, Int8))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, mesh: Mesh, key: str = "batch_size") -> None:
    """InputError where the mesh's data x fsdp does not divide `rows`."""
    shards = axis_size(mesh, BATCH_AXES)
    if rows % shards:
        raise InputError(f"{key}: {rows} rows are not divided by mesh data x fsdp = {shards}")


def current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, whose axes the compiler divides; None without one, and inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types) else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation by logical axes, one for each dimension, under the mesh of `jax.set_mesh`.

    Dimensions that the mesh doesn't divide stay unconstrained, so that one row can be scored on any mesh; without a
    mesh, and inside shard_map, x is returned as it is.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = []
    for axis, size in zip(axes, x.shape, strict=True):
        mesh_axis = None if axis is None else LOGICAL_TO_MESH[axis]
        divides = mesh_axis is not None and size % axis_size(mesh, mesh_axis) == 0
        spec.append(mesh_axis if divides else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
