"""Takes a model's weights and a batch of rows; gives response log-probs, entropies, losses of them, values and scores.

Letters: B rows, T row length, N responses, W response columns (`Batch.window`), D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpo_jax import lm_head
from mpo_jax.models import decoder, flash
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import losses, masks
from mpo_jax.types import Batch, PyTree, record


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


RowsLoss = Callable[[ResponseLogps, PyTree], losses.Loss]
"""(log-probs of some rows, what else belongs to these rows) -> their loss, as `lm_head.row_losses` wants it: the loss
of a batch is the sum of its rows' losses, and rows of zeros (of weight 0, without a response) add nothing."""


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
    whose logits exist at a time; None: `lm_head.default_chunk`.
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
    sources, targets, segment = _columns(hidden, batch)
    matrix = decoder.unembedding(config, weights)
    logps, entropies = lm_head.token_logps(config, matrix, sources, targets, temperature, entropy, chunk)
    return _of_responses(logps, entropies, segment)


def response_loss(
    config: ModelConfig, weights: PyTree, batch: Batch, loss: RowsLoss, chunk: int | None = None
) -> losses.Loss:
    """`loss(response_logps(...), batch)`, whose gradient computes no logits a second time."""
    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments)
    return loss_of_hidden(config, weights, hidden, batch, loss, batch, chunk=chunk)


def loss_of_hidden(
    config: ModelConfig,
    weights: PyTree,
    hidden: jax.Array,
    batch: Batch,
    loss: RowsLoss,
    rows: PyTree,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> losses.Loss:
    """`loss(logps_of_hidden(...), rows)`, likewise, from hidden states [B,T,D]. rows: what else the loss reads, arrays
    [B,...].

    Rows with more than `lm_head.LONGEST` response columns have their logits computed twice."""
    if batch.window > lm_head.LONGEST:
        return loss(logps_of_hidden(config, weights, hidden, batch, temperature, entropy, chunk), rows)
    sources, targets, segment = _columns(hidden, batch)

    def of_chunk(logps, entropies, rows):
        segment, rows = rows
        return loss(_of_responses(logps, entropies, segment), rows)

    matrix = decoder.unembedding(config, weights)
    return lm_head.row_losses(config, matrix, sources, targets, (segment, rows), of_chunk, temperature, entropy, chunk)


def _columns(hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the response columns: the hidden states [B,W,D] that predict them, their tokens and segments i32 [B,W]."""
    target_index, source_index, segment = masks.response_columns(batch.segments, batch.window)
    sources = jnp.take_along_axis(hidden, source_index[:, :, None], axis=1)
    return sources, jnp.take_along_axis(batch.tokens, target_index, axis=1), segment


def _of_responses(logps: jax.Array, entropies: jax.Array | None, segment: jax.Array) -> ResponseLogps:
    mask, zero = segment > 0, jnp.float32(0)
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
