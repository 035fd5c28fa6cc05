"""Takes tokens, positions and segments with a model's weights; gives hidden states, and a key-value cache out and in.

One Linen decoder for every family, driven by `ModelConfig`. A model's weights are a dict of collections: "params" (the
trunk, layers stacked on axis 0), "lora" (adapters, optional), "head" (the scalar head of reward and value models,
optional). Letters: B rows, T row length, N responses, P prompt slots, R response slots, V padded vocabulary, L layers,
D width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.models import attention, flash, parameters
from mpo_jax.models.attention import LayerCache, RowContext, StepContext
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import rope
from mpo_jax.ops.product import product, products
from mpo_jax.ops.rounding import in_float32, rounded
from mpo_jax.sharding import constrain, map_weights
from mpo_jax.types import PyTree, record

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_INIT_STD = 0.02


@record
class Cache:
    """What a decode step reads and writes. layers: one LayerCache for each layer (responses' slots are written in
    place). prompt_positions, prompt_segments: i32 [B,P]. cursor: i32 [], steps taken. began: i32 [B], at which of them
    a row's first token was written: rows may begin at different times.

    Slots are a ring: a step writes all rows at the slot cursor modulo slots, so that no row needs a place of its own,
    and of a row those are visible that were written since it began. Slots must be as many as any row takes steps."""

    layers: tuple[LayerCache, ...]
    prompt_positions: jax.Array
    prompt_segments: jax.Array
    cursor: jax.Array
    began: jax.Array


def init(config: ModelConfig, key: jax.Array, head: bool = False) -> PyTree:
    """Random weights, f32. With `head`, a scalar head of small standard deviation, so that scores begin near 0."""
    config = dataclasses.replace(config, attention="xla")  # weights don't depend on it, and one token is no flash row
    tokens = jnp.ones((1, 1), jnp.int32)
    context = _row_context(config, jnp.zeros_like(tokens), tokens, None)
    weights = dict(_Decoder(config).init(key, tokens, context))
    if head:
        weights |= init_head(config, jax.random.fold_in(key, 1))
    return weights


def init_head(config: ModelConfig, key: jax.Array) -> PyTree:
    """{"head": {"kernel": f32 [D,1]}}, standard deviation 1 / (D + 1)."""
    kernel = jax.random.normal(key, (config.width, 1), jnp.float32) / (config.width + 1)
    return {"head": {"kernel": kernel}}


def forward(
    config: ModelConfig,
    weights: PyTree,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    slots: flash.Slots | None = None,
) -> jax.Array:
    """Hidden states after the final norm: i32 [B,T] three times -> [B,T,D] in the compute dtype.

    slots: the columns of a slot-form row, where they are known beforehand: flash then has a constant mask, and with xla
    a row of responses that is cut behind its last token keeps its bits.
    """
    context = _row_context(config, positions, segments, slots)
    outputs: Any = _Decoder(config).apply(_narrow_kernels(config, _trunk(weights)), tokens, context)
    return outputs[0]


def prefill(
    config: ModelConfig,
    weights: PyTree,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    responses: int,
    slots: int,
) -> tuple[jax.Array, Cache]:
    """Runs prompts i32 [B,P] once and makes room for `responses` responses of `slots` tokens to each.

    Returns hidden [B,P,D] and the cache, whose cursor is 0, where all rows begin.
    """
    # A prompt is contiguous, wherever it lies: columns differ as positions do.
    context = _row_context(config, positions, segments, flash.Slots(tokens.shape[1], 0, 0))
    outputs: Any = _Decoder(config, keep_kv=True).apply(_trunk(weights), tokens, context)
    hidden, (keys, values) = outputs
    empty = jnp.zeros((tokens.shape[0], config.kv_heads * responses, slots, config.head_dim), keys.dtype)
    layers = tuple(
        LayerCache(keys[i].swapaxes(1, 2), values[i].swapaxes(1, 2), empty, empty) for i in range(config.layers)
    )
    zero = jnp.zeros((), jnp.int32)
    return hidden, Cache(layers, positions, segments, zero, jnp.zeros(tokens.shape[:1], jnp.int32))


def widen(cache: Cache, slots: int) -> Cache:
    """The cache with `slots` slots for each response, the new ones empty behind the old; before it has gone round."""

    def wider(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))

    layers = (dataclasses.replace(layer, keys=wider(layer.keys), values=wider(layer.values)) for layer in cache.layers)
    return dataclasses.replace(cache, layers=tuple(layers))


def decode_layout(config: ModelConfig, weights: PyTree) -> PyTree:
    """The weights as decoding reads them: `cast` to compute, one tree for each layer instead of a stack."""
    cast = cast_weights(config, _trunk(weights))
    stacks = {name: tree["layers"] for name, tree in cast.items()}
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], stacks) for i in range(config.layers))
    return {"params": {k: v for k, v in cast["params"].items() if k != "layers"}, "layers": layers}


def cast_weights(config: ModelConfig, weights: PyTree) -> PyTree:
    """The weights in the dtypes that computing gives them, for many uses of one cast."""

    return map_weights(lambda name, x: x.astype(parameters.read_dtype(config, name)), weights)


def _narrow_kernels(config: ModelConfig, weights: PyTree) -> PyTree:
    """Matrices in bfloat16 before the loop over layers, so that it slices half the bytes, and stacks their gradients,
    which are bfloat16's anyway, as such. Tables stay: a token's gradients are added up in float32."""
    if config.dtype != "bfloat16":
        return weights

    def narrow(name: str, x: jax.Array) -> jax.Array:
        return x if name.rsplit("/", 1)[-1] in ("scale", "bias", "embedding") else x.astype(config.operand_dtype)

    return map_weights(narrow, weights)


def decode_step(
    config: ModelConfig, layout: PyTree, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One new token for each response: tokens, positions i32 [B,N] -> hidden [B,N,D] and the cache moved on by one."""
    cos, sin = _angles(config, positions)
    context = StepContext(cos, sin, positions, cache.prompt_positions, cache.prompt_segments, cache.cursor, cache.began)
    decoder = _Decoder(config)
    params = {"params": layout["params"]}
    x: Any = decoder.apply(params, tokens, positions, method=_Decoder.embed)
    layers = []
    for kind, layer, layer_cache in zip(attention.layer_kinds(config), layout["layers"], cache.layers, strict=True):
        x, written = _decode_block(config, kind, layer, x, context, layer_cache)
        layers.append(written)
    hidden: Any = decoder.apply(params, x, method=_Decoder.finish)
    return hidden, dataclasses.replace(cache, layers=tuple(layers), cursor=cache.cursor + 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_block(config: ModelConfig, kind: int, layer: PyTree, x: jax.Array, context: StepContext, cache: LayerCache):
    """A layer of a step. Jitted so that layers of one kind are traced and lowered once, and not 32 times."""
    outputs: Any = _Block(config).apply(layer, x, kind, context, cache)
    return outputs


def unembedding(config: ModelConfig, weights: PyTree) -> jax.Array:
    """The output matrix [V,D]: the embedding itself where the two are tied."""
    params = weights["params"]
    return params["embed"]["embedding"] if config.tied_embeddings else params["lm_head"]["kernel"]


def finish_logits(config: ModelConfig, products: jax.Array, first_id: jax.Array | int = 0) -> jax.Array:
    """Logits f32 [...,V] from the products with the output matrix: soft cap, and padding ids masked.

    first_id: the token id of column 0, where only a shard of the vocabulary is at hand.
    """
    logits = products.astype(jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    if config.vocab_size == config.padded_vocab:
        return logits
    ids = first_id + jnp.arange(logits.shape[-1], dtype=jnp.int32).reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.where(ids < config.vocab_size, logits, -1e30)


def logits(config: ModelConfig, weights: PyTree, hidden: jax.Array) -> jax.Array:
    """All logits f32 [...,V] of some hidden states [...,D]. For a few positions at a time: training and scoring go
    through `scoring`, which never holds [B,T,V]."""
    return finish_logits(config, output_products(config, hidden, unembedding(config, weights)))


def output_products(config: ModelConfig, hidden: jax.Array, matrix: jax.Array, transposed: bool = True) -> jax.Array:
    """f32 [...,V]: hidden [...,D] times the output matrix [V,D], or [D,V] where it is not `transposed`."""
    return product(hidden, matrix, config.operand_dtype, jnp.float32, transposed)


def scalar_head(weights: PyTree, hidden: jax.Array) -> jax.Array:
    """The scalar of each hidden state, f32: [...,D] -> [...]."""
    return jnp.einsum("...d,do->...o", hidden.astype(jnp.float32), weights["head"]["kernel"])[..., 0]


def _trunk(weights: PyTree) -> PyTree:
    return {name: weights[name] for name in ("params", "lora") if name in weights}


def _row_context(config, positions, segments, slots) -> RowContext:
    cos, sin = _angles(config, positions)
    return RowContext(cos, sin, positions, segments, attention.row_masks(config, positions, segments), slots)


def _angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    if config.rope_dim == 0:
        return None, None
    inv_freq = rope.frequencies(config.rope_dim, config.rope_theta, config.rope_linear_factor)
    if config.rope_llama3 is not None:
        scaling = config.rope_llama3
        inv_freq = rope.llama3_frequencies(
            inv_freq,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_positions,
        )
    return rope.angles(positions, inv_freq, kept=config.unroll)


class _Decoder(nn.Module):
    config: ModelConfig
    keep_kv: bool = False

    def setup(self):
        config = self.config
        tokens = (config.padded_vocab, config.width)
        self.embed_table = _Table(tokens, config.vocab_size, "embedding", name="embed")
        if config.learned_positions:
            self.position_table = _Table(
                (config.max_positions, config.width), config.max_positions, "embedding", name="positions"
            )
        if not config.tied_embeddings:
            self.lm_head = _Table(tokens, config.vocab_size, "kernel", name="lm_head")
        block = _Block
        if config.remat != "none":
            policies = jax.checkpoint_policies
            policy = policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
            block = nn.remat(_Block, policy=policy, prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.layers,
            unroll=config.layers if config.unroll and config.remat == "none" else 1,
        )
        self.layers = stack(config, self.keep_kv, name="layers")
        self.final_norm = _Norm(config, config.width)

    def __call__(self, tokens, context: RowContext):
        x = self.embed(tokens, context.positions)
        kinds = jnp.asarray(attention.layer_kinds(self.config), jnp.int32)
        x, kv = self.layers(x, kinds, context)
        if self.is_initializing() and not self.config.tied_embeddings:
            self.lm_head()  # read by `unembedding` alone; called here so that it is initialised with the rest
        return self.finish(x), kv

    def embed(self, tokens, positions):
        config = self.config
        table = constrain(self.embed_table(), "vocab", None)  # gathered over fsdp like every other weight
        x = rounded(table[tokens], config.activation_dtype)
        if config.embed_scale is not None:
            x = in_float32(jnp.multiply, x, jnp.asarray(config.embed_scale, x.dtype))
        if config.learned_positions:
            x = in_float32(jnp.add, x, rounded(self.position_table()[positions], config.activation_dtype))
        return constrain(x, "batch", None, None)

    def finish(self, x):
        return self.final_norm(x)


class _Table(nn.Module):
    """An embedding table [rows, D], of which the rows from `used` on are padding and begin at zero."""

    shape: tuple[int, int]
    used: int
    leaf: str

    @nn.compact
    def __call__(self):
        def init(key, shape):
            drawn = nn.initializers.normal(_INIT_STD)(key, shape)
            return jnp.where(jnp.arange(shape[0])[:, None] < self.used, drawn, 0)

        return self.param(self.leaf, init, self.shape)


class _Block(nn.Module):
    config: ModelConfig
    keep_kv: bool = False

    @nn.compact
    def __call__(self, x, kind, context: RowContext | StepContext, cache: LayerCache | None = None):
        """x [B,T,D] -> x and, with a cache, the cache written to; without, the keys and values if they are kept."""
        config = self.config
        norm = functools.partial(_Norm, config, config.width)
        attended, kept = _Attention(config, self.keep_kv, name="attn")(norm(name="attn_norm")(x), kind, context, cache)
        if config.post_norms:
            attended = norm(name="post_attn_norm")(attended)
        branch_input = x if config.parallel_residual else in_float32(jnp.add, x, attended)
        out = _Mlp(config, name="mlp")(norm(name="mlp_norm")(branch_input))
        if config.post_norms:
            out = norm(name="post_mlp_norm")(out)
        if config.parallel_residual:
            branch_input = in_float32(jnp.add, x, attended)
        out = in_float32(jnp.add, branch_input, out)
        return constrain(out, "batch", None, None), kept


class _Attention(nn.Module):
    config: ModelConfig
    keep_kv: bool

    @nn.compact
    def __call__(self, x, kind, context: RowContext | StepContext, cache: LayerCache | None):
        config = self.config
        projection = functools.partial(_Projection, config, (config.width,), biased=config.qkv_bias)
        heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        q, k, v = _project(x, *(projection((count, config.head_dim), name=name) for name, count in heads.items()))
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        if config.qk_norm:
            q = _Norm(config, config.head_dim, name="q_norm")(q)
            k = _Norm(config, config.head_dim, name="k_norm")(k)
        if context.cos is not None and context.sin is not None:
            q, k = rope.rotate(q, context.cos, context.sin), rope.rotate(k, context.cos, context.sin)
        kept: Any = (k, v) if self.keep_kv else None
        if isinstance(context, RowContext):
            out = attention.attend_rows(config, q, k, v, kind, context)
        else:
            assert cache is not None
            out, kept = attention.attend_step(config, q, k, v, kind, context, cache)
        output = _Projection(config, (config.heads, config.head_dim), (config.width,), config.o_bias, name="o")
        return output(out), kept


class _Mlp(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        projection = functools.partial(_Projection, config, biased=config.mlp_bias)
        names = ("up", "gate") if config.gated_mlp else ("up",)
        hidden, *gate = _project(x, *(projection((config.width,), (config.mlp_width,), name=name) for name in names))
        activation = _ACTIVATIONS[config.activation]
        if config.recomputes:
            hidden = jax.checkpoint(functools.partial(_activate, activation))(hidden, *gate)
        else:
            hidden = _activate(activation, hidden, *gate)
        hidden = constrain(hidden, "batch", None, "mlp")
        return projection((config.mlp_width,), (config.width,), name="down")(hidden)


def _activate(activation, hidden, gate=None):
    activation = functools.partial(in_float32, activation)
    return activation(hidden) if gate is None else in_float32(jnp.multiply, hidden, activation(gate))


class _Projection(nn.Module):
    """x [..., *inputs] times kernel [*inputs, *outputs], plus an adapter where the "lora" collection holds one."""

    config: ModelConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    biased: bool = False

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(_INIT_STD), self.inputs + self.outputs)
        if self.biased:
            self.bias = self.param("bias", nn.initializers.zeros_init(), self.outputs)

    def __call__(self, x):
        return _project(x, self)[0]

    def matrix(self):
        return self.kernel.reshape(math.prod(self.inputs), -1)

    def finish(self, flat, out):
        """What the product `out` of `flat` with the matrix lacks: adapter, shape and bias."""
        config = self.config
        if self.has_variable("lora", "a"):
            if config.lora is None:
                raise ValueError("the weights hold adapters, but the config's lora is None")
            a: jax.Array = self.get_variable("lora", "a")
            b: jax.Array = self.get_variable("lora", "b")
            rank = b.shape[0]
            times = functools.partial(product, dtype=config.operand_dtype)
            adapted = times(times(flat, a.reshape(-1, rank)), b.reshape(rank, -1))
            scaled = in_float32(jnp.multiply, adapted, jnp.asarray(config.lora.scale, out.dtype))
            out = in_float32(jnp.add, out, scaled)
        out = out.reshape(flat.shape[:-1] + self.outputs)
        if self.biased:
            bias = rounded(self.bias, out.dtype).reshape((1,) * (flat.ndim - 1) + self.outputs)
            out = in_float32(jnp.add, out, bias)
        return out


def _project(x, *projections: _Projection) -> list[jax.Array]:
    """One input through several projections of its shape."""
    flat = x.reshape((*x.shape[: x.ndim - len(projections[0].inputs)], -1))
    outs = products(flat, [each.matrix() for each in projections], projections[0].config.operand_dtype)
    return [each.finish(flat, out) for each, out in zip(projections, outs, strict=True)]


class _Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm over the last axis, in float32."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x):
        config = self.config
        plus_one = config.norm == "rms_plus_one"
        init = nn.initializers.zeros_init() if plus_one else nn.initializers.ones_init()
        parameters = [self.param("scale", init, (self.width,))]
        if config.norm == "layer":
            parameters.append(self.param("bias", nn.initializers.zeros_init(), (self.width,)))
        normalise = functools.partial(_normalise, config)
        return (jax.checkpoint(normalise) if config.recomputes else normalise)(x, *parameters)


def _normalise(config: ModelConfig, x, scale, bias=None):
    def weight(leaf):
        return leaf.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))

    wide = x.astype(jnp.float32)
    scale = weight(scale)
    if bias is not None:
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + np.float32(config.norm_eps))
    wide *= scale + 1 if config.norm == "rms_plus_one" else scale
    if bias is not None:
        wide += weight(bias)
    return rounded(wide, config.activation_dtype)
