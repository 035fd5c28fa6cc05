"""Takes a model's weights and a batch of rows; gives response log-probs, entropies, values and reward scores.

The output matrix meets the hidden states a chunk of tokens at a time, so that no [B,T,V] array exists in the forward or
the backward pass. Letters: B rows, T row length, N responses, W response columns (`Batch.window`), V padded vocabulary,
D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mpo_jax.models import decoder, flash
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import masks
from mpo_jax.ops.product import RECOMPUTED, over_rows, product
from mpo_jax.ops.rounding import rounded
from mpo_jax.sharding import BATCH_AXES, axis_size
from mpo_jax.types import Batch, PyTree, record

CHUNK = 512
"""Tokens of one shard whose logits exist at a time: 512 x V/tensor x 4 bytes, 65 MB at V = 32,000."""
GPU_CHUNK = 2048
"""On a GPU: each chunk also reads and writes the output matrix's gradient, 1 GB at V = 128,256 and D = 2,048."""


@record
class ResponseLogps:
    """logps, entropy: f32 [B,W], 0 where a column holds no response token. segment: i32 [B,W], which response each
    column belongs to (2 + n; 0: none). entropy is None unless asked for."""

    logps: jax.Array
    segment: jax.Array
    entropy: jax.Array | None = None

    @property
    def mask(self) -> jax.Array:
        return self.segment > 0

    def seq_logps(self, responses: int) -> jax.Array:
        """Summed over each response: f32 [B,N]."""
        return masks.by_response(self.logps, self.segment, responses)


def response_logps(
    config: ModelConfig,
    weights: PyTree,
    batch: Batch,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
    slots: flash.Slots | None = None,
) -> ResponseLogps:
    """Log-probs of a batch's response tokens under softmax(logits / temperature).

    Policy, old policy, reference and entropy all come from here, at the sampling temperature. chunk: tokens of a shard
    whose logits exist at a time; None: `CHUNK`, or `GPU_CHUNK`.
    """
    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments, slots)
    return logps_of_hidden(config, weights, hidden, batch, temperature, entropy, chunk)


def logps_of_hidden(
    config: ModelConfig,
    weights: PyTree,
    hidden: jax.Array,
    batch: Batch,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> ResponseLogps:
    """As `response_logps`, from hidden states [B,T,D] that are at hand."""
    target_index, source_index, segment = masks.response_columns(batch.segments, batch.window)
    sources = jnp.take_along_axis(hidden, source_index[:, :, None], axis=1)
    targets = jnp.take_along_axis(batch.tokens, target_index, axis=1)
    matrix = decoder.unembedding(config, weights)
    logps, entropies = token_logps(config, matrix, sources, targets, temperature, entropy, chunk)
    mask = segment > 0
    zero = jnp.float32(0)
    entropies = None if entropies is None else jnp.where(mask, entropies, zero)
    return ResponseLogps(jnp.where(mask, logps, zero), segment, entropies)


def response_values(config: ModelConfig, weights: PyTree, batch: Batch, slots: flash.Slots | None = None) -> jax.Array:
    """f32 [B,W]: the critic's value of the state in which each response token was chosen (before it was)."""
    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments, slots)
    return values_of_hidden(weights, hidden, batch)


def values_of_hidden(weights: PyTree, hidden: jax.Array, batch: Batch) -> jax.Array:
    """As `response_values`, from hidden states [B,T,D] that are at hand."""
    _, source_index, segment = masks.response_columns(batch.segments, batch.window)
    sources = jnp.take_along_axis(hidden, source_index[:, :, None], axis=1)
    return jnp.where(segment > 0, decoder.scalar_head(weights, sources), jnp.float32(0))


def response_scores(
    config: ModelConfig, weights: PyTree, batch: Batch, responses: int, slots: flash.Slots | None = None
) -> jax.Array:
    """f32 [B,N]: the scalar head at each response's last real token (the prompt's, where the response is empty)."""
    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments, slots)
    last = masks.last_index(batch.segments, responses)
    return decoder.scalar_head(weights, jnp.take_along_axis(hidden, last[:, :, None], axis=1))


def token_logps(
    config: ModelConfig,
    matrix: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probs f32 [B,W] of targets i32 [B,W] after hidden [B,W,D] with output matrix [V,D]; the entropies, if asked.

    Under a mesh (`jax.set_mesh`) the matrix is gathered over data and fsdp once before the loop over chunks, its
    gradient is accumulated in each shard and reduced once after it; over tensor only [chunk] vectors travel.
    """
    if chunk is None:
        chunk = GPU_CHUNK if flash.platform() == "gpu" else CHUNK
    local = functools.partial(_local_logps, config, temperature, entropy, chunk)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(None, matrix, hidden, targets)
    rows = BATCH_AXES if hidden.shape[0] % axis_size(mesh, BATCH_AXES) == 0 else ()
    by_row = PartitionSpec(rows or None)
    return jax.shard_map(
        functools.partial(local, rows),
        in_specs=(PartitionSpec("tensor", None), by_row, by_row),
        out_specs=(by_row, by_row if entropy else PartitionSpec()),
    )(matrix, hidden, targets)


def _local_logps(config, temperature, entropy, chunk, rows, matrix, hidden, targets):
    """One shard's part. rows: the mesh axes that rows are spread over; None: no mesh at all."""
    if rows is not None:
        # Made to vary here, the matrix gets its gradient summed over these axes once, outside the loop.
        matrix = jax.lax.pcast(matrix, rows, to="varying") if rows else matrix
        hidden, targets = (jax.lax.pcast(x, ("tensor",), to="varying") for x in (hidden, targets))
    shape, width = targets.shape, hidden.shape[-1]
    tokens = targets.size
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    head = _Head(config, temperature, entropy, () if rows is None else (*rows, "tensor"))
    logps, entropies = _chunked(
        head,
        matrix,
        jnp.pad(hidden.reshape(tokens, width), ((0, padding), (0, 0))).reshape(-1, chunk, width),
        jnp.pad(targets.reshape(tokens), (0, padding)).reshape(-1, chunk),
    )

    def back(x):
        return x.reshape(-1)[:tokens].reshape(shape)

    return back(logps), back(entropies) if entropy else None


class _Head(NamedTuple):
    """How hidden states become log-probs. axes: those of the mesh that a shard is one part of, "tensor" (over which the
    vocabulary is spread) the last of them; none without a mesh."""

    config: ModelConfig
    temperature: float
    entropy: bool
    axes: tuple[str, ...]

    def first_id(self, columns: int) -> jax.Array:
        """i32 []: the token id of this shard's first column."""
        if not self.axes:
            return jnp.int32(0)
        return jax.lax.axis_index("tensor").astype(jnp.int32) * columns

    def logits(self, products: jax.Array, first_id: jax.Array) -> jax.Array:
        logits = decoder.finish_logits(self.config, products, first_id)
        return logits if self.temperature == 1 else logits / jnp.float32(self.temperature)

    def across(self, reduce, x: jax.Array) -> jax.Array:
        return reduce(x, "tensor") if self.axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(head: _Head, matrix: jax.Array, hidden: jax.Array, targets: jax.Array):
    """matrix [V,D], hidden [chunks,C,D], targets i32 [chunks,C] -> logps and entropies f32 [chunks,C] (or None).

    Its own derivative, so that the backward pass computes a chunk's logits once more and nothing else again. The
    matrix's gradient is summed as [D,V]: so no product needs [C,V] transposed.
    """
    return _chunked_forward(head, matrix, hidden, targets)[0]


def _chunked_forward(head, matrix, hidden, targets):
    narrow = rounded(matrix, head.config.operand_dtype)
    first_id = head.first_id(matrix.shape[0])

    def one(hidden, targets):
        logits = head.logits(decoder.output_products(head.config, hidden, narrow), first_id)
        top = head.across(jax.lax.pmax, jnp.max(logits, axis=-1))
        exponentials = jnp.exp(logits - top[:, None])
        total = head.across(jax.lax.psum, jnp.sum(exponentials, axis=-1))
        column = targets - first_id
        here = (column >= 0) & (column < logits.shape[-1])
        at_target = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=-1)[:, 0] - top
        at_target = head.across(jax.lax.psum, jnp.where(here, at_target, jnp.float32(0)))
        log_total = jnp.log(total)
        logps, normaliser = at_target - log_total, top + log_total
        if not head.entropy:
            return logps, normaliser, None
        # Shifted logits of padding ids are finite and their exponentials exactly 0.
        weighted = jnp.sum(exponentials * (logits - top[:, None]), axis=-1)
        return logps, normaliser, log_total - head.across(jax.lax.psum, weighted) / total

    _, (logps, normalisers, entropies) = jax.lax.scan(lambda _, part: (None, one(*part)), None, (hidden, targets))
    like = jnp.zeros((0,), matrix.dtype)  # what the matrix's gradient has to be
    return (logps, entropies), (narrow, hidden, targets, normalisers, entropies, like)


def _chunked_backward(head, kept, gradients):
    narrow, hidden, targets, normalisers, entropies, like = kept
    first_id = head.first_id(narrow.shape[0])
    ids = first_id + jnp.arange(narrow.shape[0], dtype=jnp.int32)[None]
    operand = head.config.operand_dtype

    def one(of_matrix, part):
        hidden, *of_tokens = part
        targets, normaliser, entropy, (of_logps, of_entropies) = jax.tree.map(lambda x: x[:, None], of_tokens)
        with jax.named_scope(RECOMPUTED):
            products = decoder.output_products(head.config, hidden, narrow)
        logits, finish = jax.vjp(lambda x: head.logits(x, first_id), products)
        log_chances = logits - normaliser
        chances = jnp.exp(log_chances)
        of_logits = of_logps * (jnp.where(ids == targets, jnp.float32(1), jnp.float32(0)) - chances)
        if head.entropy:
            of_logits -= of_entropies * chances * (log_chances + entropy)
        (of_products,) = finish(of_logits)
        of_products = of_products.astype(hidden.dtype)
        of_matrix += over_rows(hidden, of_products, operand)
        return of_matrix, product(of_products, narrow, operand, jnp.float32)

    zeros = jnp.zeros(narrow.shape[::-1], jnp.float32)
    if head.axes:  # a sum begins as its shards go on
        zeros = jax.lax.pcast(zeros, head.axes, to="varying")
    of_matrix, of_hidden = jax.lax.scan(one, zeros, (hidden, targets, normalisers, entropies, gradients))
    return of_matrix.T.astype(like.dtype), of_hidden.astype(hidden.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)
