"""A decoder's config enters; fresh low-rank adapters leave, and adapters merged into the weights they adapt.

Hu et al. 2021 (arXiv 2106.09685): W + alpha / rank * a b. The adapters are the weights' "lora" collection; where they
are trained, nothing else is but the scalar head of reward and value models.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.models.config import LoraConfig, ModelConfig
from mpo_jax.types import PyTree


def init(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> PyTree:
    """{"lora": tree}: a [L,*in,rank] uniform within 1 / sqrt(in), as PEFT draws it, and b [L,rank,*out] zero, f32.

    So fresh adapters change nothing. With a mesh, sharded over it; the values are the same on any.
    Raises InputError for a target that the model has not, or a config without lora.
    """
    adapters = _adapters(config)
    shapes = projection_shapes(config)
    unknown = sorted(set(adapters.targets) - set(shapes))
    if unknown:
        raise InputError(f"model.lora.targets: {unknown}; a {config.family} model has {sorted(shapes)}")

    def draw():
        tree: dict = {"attn": {}, "mlp": {}}
        for index, name in enumerate(sorted(adapters.targets)):
            inputs, outputs = shapes[name]
            bound = 1 / math.sqrt(math.prod(inputs))
            shape = (config.layers, *inputs, adapters.rank)
            a = jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)
            b = jnp.zeros((config.layers, adapters.rank, *outputs), jnp.float32)
            tree[_block(name)][name] = {"a": a, "b": b}
        return {"lora": {"layers": {block: found for block, found in tree.items() if found}}}

    if mesh is None:
        return draw()
    return jax.jit(draw, out_shardings=sharding.tree_shardings(jax.eval_shape(draw), mesh))()


def merge(config: ModelConfig, weights: PyTree) -> PyTree:
    """The weights without "lora", each adapted kernel W + alpha / rank * a b in f32, cast back to its own dtype.

    Weights without adapters are returned as they are.
    """
    if "lora" not in weights:
        return weights
    scale = _adapters(config).scale
    layers = dict(weights["params"]["layers"])
    for block, projections in weights["lora"]["layers"].items():
        merged = dict(layers[block])
        for name, adapter in projections.items():
            kernel = merged[name]["kernel"]
            merged[name] = merged[name] | {"kernel": _merged(kernel, adapter["a"], adapter["b"], scale)}
        layers[block] = merged
    rest = {name: tree for name, tree in weights.items() if name not in ("params", "lora")}
    return {"params": weights["params"] | {"layers": layers}, **rest}


def mean(adapters: Sequence[PyTree], shares: Sequence[float]) -> tuple[PyTree, jax.Array]:
    """The adapters of the same rank whose products a b come nearest to the weighted sum of the given ones' products,
    and how far off they are, f32 []: the Frobenius norm of what is missing over that of the sum.

    adapters: {"lora": tree} each, all of one shape. A sum of products has a higher rank than each: its best
    approximation are its leading singular vectors (Eckart & Young 1936), found without building it, as PEFT's
    `add_weighted_adapter` combines adapters by "svd". Exact where the sum has no higher rank than one.
    """
    flat = [jax.tree.flatten(each, is_leaf=lambda node: isinstance(node, dict) and set(node) == {"a", "b"})
            for each in adapters]  # fmt: skip
    found = [_nearest([leaves[place] for leaves, _ in flat], shares) for place in range(len(flat[0][0]))]
    missing, whole = (sum(each[part] for each in found) for part in (1, 2))
    return jax.tree.unflatten(flat[0][1], [each[0] for each in found]), jnp.sqrt(missing / jnp.maximum(whole, 1e-30))


def _nearest(adapters: Sequence[PyTree], shares: Sequence[float]) -> tuple[PyTree, jax.Array, jax.Array]:
    """One projection's part of `mean`; the squared norms of what is missing, and of the sum."""
    a, b = adapters[0]["a"], adapters[0]["b"]
    layers, rank = b.shape[:2]
    left = jnp.concatenate([each["a"].reshape(layers, -1, rank) for each in adapters], axis=2)
    right = jnp.concatenate(
        [
            jnp.float32(share) * each["b"].reshape(layers, rank, -1)
            for each, share in zip(adapters, shares, strict=True)
        ],
        axis=1,
    )
    left, within = jnp.linalg.qr(left)
    right, beside = jnp.linalg.qr(right.swapaxes(1, 2))
    core = jnp.einsum("lir,lor->lio", within, beside, precision="highest")
    u, s, v = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.sqrt(s[:, :rank])
    found_a = jnp.einsum("lik,lkr->lir", left, u[:, :, :rank] * root[:, None, :], precision="highest")
    found_b = jnp.einsum("lrk,lok->lro", root[:, :, None] * v[:, :rank], right, precision="highest")
    wide = rank - root.shape[1]  # of a projection narrower than the rank
    found_a, found_b = jnp.pad(found_a, ((0, 0), (0, 0), (0, wide))), jnp.pad(found_b, ((0, 0), (0, wide), (0, 0)))
    return {"a": found_a.reshape(a.shape), "b": found_b.reshape(b.shape)}, jnp.sum(s[:, rank:] ** 2), jnp.sum(s**2)


def split(weights: PyTree) -> tuple[PyTree, PyTree]:
    """(trainable, frozen) collections: under LoRA the trunk is frozen, without it nothing is.

    The two joined (`trainable | frozen`) are the weights again.
    """
    frozen = {"params"} if "lora" in weights else set()
    return (
        {name: tree for name, tree in weights.items() if name not in frozen},
        {name: tree for name, tree in weights.items() if name in frozen},
    )


def projection_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The inputs and outputs of each projection that the model has."""
    width, mlp = (config.width,), (config.mlp_width,)
    heads, kv_heads = (config.heads, config.head_dim), (config.kv_heads, config.head_dim)
    shapes = {"q": (width, heads), "k": (width, kv_heads), "v": (width, kv_heads), "o": (heads, width)}
    shapes |= {"up": (width, mlp), "down": (mlp, width)}
    return shapes | {"gate": (width, mlp)} if config.gated_mlp else shapes


def _adapters(config: ModelConfig) -> LoraConfig:
    if config.lora is None:
        raise InputError("model.lora: none is set; give its rank, alpha and targets")
    return config.lora


def _block(name: str) -> str:
    return "attn" if name in ("q", "k", "v", "o") else "mlp"


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    layers, rank = b.shape[:2]
    flat_a = a.reshape(layers, -1, rank).astype(jnp.float32)
    flat_b = b.reshape(layers, rank, -1).astype(jnp.float32)
    delta = jnp.einsum("lir,lro->lio", flat_a, flat_b).reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + delta * jnp.float32(scale)).astype(kernel.dtype)
