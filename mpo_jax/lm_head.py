"""Hidden states, targets and an output matrix enter; log-probs and entropies leave, or a loss made of them.

The matrix meets the hidden states a chunk of tokens at a time, so that no [B,W,V] array exists in the forward or the
backward pass. Letters: B rows, W response columns (`Batch.window`), V padded vocabulary, D width, C tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mpo_jax.models import decoder, flash
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses
from mpo_jax.ops.product import RECOMPUTED, over_rows, product
from mpo_jax.ops.rounding import rounded
from mpo_jax.sharding import BATCH_AXES, axis_size
from mpo_jax.types import PyTree

CHUNK = 512
"""Tokens of one shard whose logits exist at a time: 512 x V/tensor x 4 bytes, 65 MB at V = 32,000."""
GPU_CHUNK = 2048
"""On a GPU: each chunk also reads and writes the output matrix's gradient, 1 GB at V = 128,256 and D = 2,048."""
LONGEST = 2048
"""Response columns of the longest row that is not cut into chunks."""

ChunkLoss = Callable[[jax.Array, jax.Array | None, PyTree], losses.Loss]
"""(log-probs f32 [rows,W], entropies likewise or None, what else belongs to the rows) -> the rows' loss."""


def default_chunk() -> int:
    return GPU_CHUNK if flash.platform() == "gpu" else CHUNK


def tokens_at_once(rows: int, window: int, chunk: int) -> int:
    """C: as many whole rows as `chunk` tokens hold, dealt out evenly, and at least one; of rows that are longer than
    `LONGEST`, `chunk` tokens. The same for log-probs and losses, so that both have the same bits."""
    if window > LONGEST:
        return min(chunk, rows * window)
    parts = max(1, min(rows, -(-rows * window // chunk)))
    return -(-rows // parts) * window


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
    gradient is accumulated in each shard and reduced once after it; over tensor only [C] vectors travel.
    """
    head = _Head(config, temperature, entropy, _axes(len(hidden)))
    local = functools.partial(_local_logps, head, chunk or default_chunk())
    return _in_shards(head, local, (head.by_row, head.by_row if entropy else PartitionSpec()), matrix, hidden, targets)


def row_losses(
    config: ModelConfig,
    matrix: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    rows: PyTree,
    loss: ChunkLoss,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> losses.Loss:
    """The loss of the log-probs that `token_logps` gives, of rows no longer than `LONGEST`. rows: arrays [B,...].

    The loss of a batch has to be the sum of its rows' losses, and rows of zeros have to add nothing: it is asked for a
    chunk's rows at a time, and its gradient right after it, while the chunk's logits are at hand. So no logits are
    computed twice, as in the fused losses of Hsu et al. 2024 (Liger Kernel, arXiv 2410.10989), section 3.2. Only the
    sum has a gradient, not weight and metrics, and only to matrix and hidden.
    """
    head = _Head(config, temperature, entropy, _axes(len(hidden)))

    def run(learns: bool, matrix, hidden):
        local = functools.partial(_local_losses, head, chunk or default_chunk(), loss, learns)
        where = (head.by_row, (_BY_TOKEN_ID, head.by_row) if learns else None)
        parts, gradients = _in_shards(head, local, where, matrix, hidden, targets, rows)
        return jax.tree.map(lambda part: jnp.sum(part, axis=0), parts), gradients

    @jax.custom_vjp
    def through(matrix, hidden):
        return run(False, matrix, hidden)[0]

    def backward(gradients, of_loss):
        return tuple((of_loss[0] * each).astype(each.dtype) for each in gradients)

    through.defvjp(functools.partial(run, True), backward)
    return through(matrix, hidden)


_BY_TOKEN_ID = PartitionSpec("tensor", None)


def _axes(rows: int) -> tuple[str, ...]:
    """Of the mesh, if there is one (`jax.set_mesh`): those that rows are spread over, and "tensor"."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return (*BATCH_AXES, "tensor") if rows % axis_size(mesh, BATCH_AXES) == 0 else ("tensor",)


class _Head(NamedTuple):
    """How hidden states become log-probs. axes: those of the mesh that a shard is one part of, "tensor" (over which the
    vocabulary is spread) the last of them; none without a mesh."""

    config: ModelConfig
    temperature: float
    entropy: bool
    axes: tuple[str, ...]

    @property
    def row_axes(self) -> tuple[str, ...]:
        return self.axes[:-1]

    @property
    def by_row(self) -> PartitionSpec:
        return PartitionSpec(self.row_axes or None)

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

    def varying(self, x: jax.Array) -> jax.Array:
        """A sum that begins, as its shards go on."""
        return jax.lax.pcast(x, self.axes, to="varying") if self.axes else x

    def read(self, logits: jax.Array, targets: jax.Array, first_id: jax.Array):
        """logits [C,V], targets i32 [C] -> log-probs, normalisers (log of the sum of exponentials) and entropies (or
        None), f32 [C]."""
        top = self.across(jax.lax.pmax, jnp.max(logits, axis=-1))
        exponentials = jnp.exp(logits - top[:, None])
        total = self.across(jax.lax.psum, jnp.sum(exponentials, axis=-1))
        column = targets - first_id
        here = (column >= 0) & (column < logits.shape[-1])
        at_target = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=-1)[:, 0] - top
        at_target = self.across(jax.lax.psum, jnp.where(here, at_target, jnp.float32(0)))
        log_total = jnp.log(total)
        logps, normaliser = at_target - log_total, top + log_total
        if not self.entropy:
            return logps, normaliser, None
        # Shifted logits of padding ids are finite and their exponentials exactly 0.
        weighted = jnp.sum(exponentials * (logits - top[:, None]), axis=-1)
        return logps, normaliser, log_total - self.across(jax.lax.psum, weighted) / total

    def of_logits(self, logits, targets, first_id, normaliser, entropies, of_logps, of_entropies) -> jax.Array:
        """The gradient [C,V] of logits, given that of log-probs and entropies f32 [C]."""
        ids = first_id + jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        targets, normaliser, of_logps = (x[:, None] for x in (targets, normaliser, of_logps))
        log_chances = logits - normaliser
        chances = jnp.exp(log_chances)
        of_logits = of_logps * (jnp.where(ids == targets, jnp.float32(1), jnp.float32(0)) - chances)
        if self.entropy:
            of_logits -= of_entropies[:, None] * chances * (log_chances + entropies[:, None])
        return of_logits

    def of_operands(self, of_products: jax.Array, hidden: jax.Array, narrow: jax.Array):
        """The gradients f32 [D,V] of the matrix and [C,D] of hidden, given that of their products [C,V]. As [D,V] no
        product needs [C,V] transposed."""
        operand, of_products = self.config.operand_dtype, of_products.astype(hidden.dtype)
        return over_rows(hidden, of_products, operand), product(of_products, narrow, operand, jnp.float32)


def _in_shards(head: _Head, local, where, matrix: jax.Array, *rows: PyTree):
    """`local(matrix, *rows)`, of each shard's part where there is a mesh. where: the specs of what it gives."""
    if not head.axes:
        return local(matrix, *rows)
    specs = (_BY_TOKEN_ID, *(head.by_row for _ in rows))
    return jax.shard_map(local, in_specs=specs, out_specs=where)(matrix, *rows)


def _local_logps(head, chunk, matrix, hidden, targets):
    """One shard's part."""
    if head.axes:
        # Made to vary here, the matrix gets its gradient summed over these axes once, outside the loop.
        matrix = jax.lax.pcast(matrix, head.row_axes, to="varying") if head.row_axes else matrix
        hidden, targets = (jax.lax.pcast(x, ("tensor",), to="varying") for x in (hidden, targets))
    (batch, window), width, tokens = targets.shape, hidden.shape[-1], targets.size
    chunk = tokens_at_once(batch, window, chunk)
    logps, entropies = _chunked(
        head,
        matrix,
        _in_chunks(hidden.reshape(tokens, width), chunk),
        _in_chunks(targets.reshape(tokens), chunk),
    )

    def back(x):
        return x.reshape(-1)[:tokens].reshape(batch, window)

    return back(logps), back(entropies) if head.entropy else None


def _in_chunks(x: jax.Array, size: int) -> jax.Array:
    """[N,...] -> [chunks,size,...], with zeros behind the last."""
    x = jnp.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(-1, size, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(head: _Head, matrix: jax.Array, hidden: jax.Array, targets: jax.Array):
    """matrix [V,D], hidden [chunks,C,D], targets i32 [chunks,C] -> logps and entropies f32 [chunks,C] (or None).

    Its own derivative, so that the backward pass computes a chunk's logits once more and nothing else again.
    """
    return _chunked_forward(head, matrix, hidden, targets)[0]


def _chunked_forward(head, matrix, hidden, targets):
    narrow = rounded(matrix, head.config.operand_dtype)
    first_id = head.first_id(matrix.shape[0])

    def one(_, part):
        hidden, targets = part
        logits = head.logits(decoder.output_products(head.config, hidden, narrow), first_id)
        return None, head.read(logits, targets, first_id)

    _, (logps, normalisers, entropies) = jax.lax.scan(one, None, (hidden, targets))
    like = jnp.zeros((0,), matrix.dtype)  # what the matrix's gradient has to be
    return (logps, entropies), (narrow, hidden, targets, normalisers, entropies, like)


def _chunked_backward(head, kept, gradients):
    narrow, hidden, targets, normalisers, entropies, like = kept
    first_id = head.first_id(narrow.shape[0])

    def one(of_matrix, part):
        hidden, targets, normaliser, entropies, (of_logps, of_entropies) = part
        with jax.named_scope(RECOMPUTED):
            products = decoder.output_products(head.config, hidden, narrow)
        logits, finish = jax.vjp(lambda x: head.logits(x, first_id), products)
        (of_products,) = finish(
            head.of_logits(logits, targets, first_id, normaliser, entropies, of_logps, of_entropies)
        )
        more, of_hidden = head.of_operands(of_products, hidden, narrow)
        return of_matrix + more, of_hidden

    zeros = head.varying(jnp.zeros(narrow.shape[::-1], jnp.float32))
    of_matrix, of_hidden = jax.lax.scan(one, zeros, (hidden, targets, normalisers, entropies, gradients))
    return of_matrix.T.astype(like.dtype), of_hidden.astype(hidden.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _local_losses(head, chunk, loss, learns, matrix, hidden, targets, rows):
    """One shard's part of `row_losses`: the loss in parts f32 [chunks] and, where it `learns`, both gradients."""
    (batch, window), width = targets.shape, hidden.shape[-1]
    together = tokens_at_once(batch, window, chunk) // window
    narrow = rounded(matrix, head.config.operand_dtype)
    first_id = head.first_id(matrix.shape[0])
    if head.axes:
        narrow = jax.lax.pcast(narrow, head.row_axes, to="varying") if head.row_axes else narrow
        hidden, targets = (jax.lax.pcast(x, ("tensor",), to="varying") for x in (hidden, targets))

    def one(of_matrix, part):
        hidden, targets, rows = part
        hidden, targets = hidden.reshape(-1, width), targets.reshape(-1)
        products = decoder.output_products(head.config, hidden, narrow)
        logits, finish = jax.vjp(lambda x: head.logits(x, first_id), products)
        logps, normaliser, entropies = head.read(logits, targets, first_id)

        def of_rows(logps, entropies):
            logps, entropies = jax.tree.map(lambda x: x.reshape(-1, window), (logps, entropies))
            total, *rest = loss(logps, entropies, rows)
            return total, rest

        if not learns:
            total, rest = of_rows(logps, entropies)
            return of_matrix, ((total, *rest), None)
        (total, rest), gradients = jax.value_and_grad(of_rows, (0, 1), has_aux=True)(logps, entropies)
        (of_products,) = finish(head.of_logits(logits, targets, first_id, normaliser, entropies, *gradients))
        more, of_hidden = head.of_operands(of_products, hidden, narrow)
        return of_matrix + more, ((total, *rest), of_hidden)

    parts = jax.tree.map(lambda x: _in_chunks(x, together), (hidden, targets, rows))
    zeros = head.varying(jnp.zeros(narrow.shape[::-1] if learns else (), jnp.float32))
    of_matrix, (found, of_hidden) = jax.lax.scan(one, zeros, parts)
    if not learns:
        return found, None
    of_matrix = of_matrix.T.astype(matrix.dtype)
    of_hidden = of_hidden.reshape(-1, window, width)[:batch].astype(hidden.dtype)
    if head.axes:
        of_matrix, of_hidden = jax.lax.psum(of_matrix, head.row_axes), jax.lax.psum(of_hidden, ("tensor",))
    return found, (of_matrix, of_hidden)
