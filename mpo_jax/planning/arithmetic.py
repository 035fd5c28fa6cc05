"""The extent of a program enters; the memory it needs beside its arguments leaves, by arithmetic, for hardware without
a compiler at hand.

The working set of one layer, in values for each token: what goes into and comes out of its products, once forward and
once as gradients, and the logits of attention. The constants were fitted to XLA's figures on CPU; a test compares.
"""

import itertools

import numpy as np

from mpo_jax.lm_head import CHUNK, GPU_CHUNK, tokens_at_once
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import cache_widths
from mpo_jax.sharding import BATCH_AXES, axis_size
from mpo_jax.stages.programs import Extent

_WIDTHS, _MLPS = 9, 3  # arrays [T,D] and [T,F] of one layer's forward pass
_LOGITS = 1.2  # arrays [H,T,T] of attention, float32, alive at a time; none is kept from forward to backward
_FLASH_LOGITS = 0.1
# Shares that are kept for the backward pass where it computes norms and activations again: of all weights trained, and
# of adapters alone. Measured on an H100 at one shape, a model of 1.2 G weights.
_RECOMPUTED, _RECOMPUTED_FROZEN = 0.55, 0.35
_FORWARD, _FROZEN = 1 / 3, 0.78  # shares of it: forward alone, and backward to activations alone (adapters)


def temporaries(extent: Extent, mesh) -> int:
    """Bytes on one device."""
    model = extent.model
    tensor, shards = axis_size(mesh, "tensor"), axis_size(mesh, BATCH_AXES)
    rows = -(-extent.rows // shards)
    gathered = 0 if shards == 1 else 2 * layer_weights(model) // tensor * _item(model)
    if extent.kind == "decode":
        return _decode(extent, rows, tensor, shards == 1)
    layer = _layer(model, rows, extent.length, tensor)
    chunk = GPU_CHUNK if model.dtype == "bfloat16" else CHUNK  # no CPU computes in it, and this reckons for no TPU
    head = 3 * tokens_at_once(rows, extent.window, chunk) * model.padded_vocab // tensor * 4
    if extent.kind == "forward":
        return int(max(layer * _FORWARD, head) + gathered)
    kept = (_RECOMPUTED if model.lora is None else _RECOMPUTED_FROZEN) if model.recomputes else 1.0
    saved = {
        "none": (model.layers - 1) * rows * extent.length * _values(model, tensor) * _item(model) * kept,
        "dots": model.layers * rows * extent.length * (3 * model.width + model.mlp_width // tensor) * _item(model),
        "full": model.layers * rows * extent.length * model.width * _item(model),
    }[model.remat]
    layer *= _FROZEN if model.lora is not None else 1.0
    gradients = extent.trained * (1.5 if extent.accumulates else 1.0)
    return int(gradients + extent.trunks * saved + max(layer, head) + gathered)


def _layer(model: ModelConfig, rows: int, length: int, tensor: int) -> float:
    """Of one layer, forward and backward."""
    logits = _LOGITS if model.attention == "xla" else _FLASH_LOGITS
    return rows * length * (_values(model, tensor) * _item(model) + logits * 4 * model.heads / tensor * length)


def _values(model: ModelConfig, tensor: int) -> int:
    """Of one layer and one token: into and out of its products, forward and as gradients."""
    return 2 * (_WIDTHS * model.width + _MLPS * model.mlp_width // tensor)


def _decode(extent: Extent, rows: int, tensor: int, one_device: bool) -> int:
    """The weights in their decoding layout, the cache, the prefill of one layer and the logits."""
    model = extent.model
    weights = (model.layers * layer_weights(model) + 2 * model.padded_vocab * model.width) // tensor * _item(model)
    heads = -(-model.kv_heads // tensor)
    cache = 2 * model.layers * rows * (extent.length + extent.window) * heads * model.head_dim * _item(model)
    responses = max(1, extent.window // max(1, extent.steps))
    logits = 4 * rows * responses * model.padded_vocab // tensor * 4
    copies = 1 if one_device else 2  # cast and gathered, then a tree for each layer
    return int(copies * weights + cache + logits + _layer(model, rows, extent.length, tensor) * _FORWARD)


def collectives(extent: Extent, mesh) -> dict[str, int]:
    """kind -> bytes on one device in one call: weights gathered over fsdp (once forward, twice backward), gradients
    scattered, activations summed over tensor."""
    model = extent.model
    tensor, fsdp = axis_size(mesh, "tensor"), axis_size(mesh, "fsdp")
    rows = -(-extent.rows // axis_size(mesh, BATCH_AXES))
    train = extent.kind == "train"
    found = {}
    weights = weight_bytes(model) // tensor
    if fsdp > 1:
        found["all-gather"] = weights * (3 if train else 1) * extent.trunks * extent.repeats
        if train:
            found["reduce-scatter"] = extent.trained * fsdp * extent.repeats
    if tensor > 1:
        tokens = extent.batches * rows * (extent.length + (extent.window if extent.kind == "decode" else 0))
        sums = 2 * model.layers * tokens * model.width * _item(model)
        found["all-reduce"] = sums * (3 if train else 1) * extent.trunks * extent.repeats
    return found


def moved(extent: Extent, mesh) -> float:
    """Bytes through one device's memory in one call: weights for each pass, optimizer state once, activations, and in a
    decode loop weights and the caches, as wide as they are by then, for each token."""
    model = extent.model
    tensor = axis_size(mesh, "tensor")
    rows = -(-extent.rows // axis_size(mesh, BATCH_AXES))
    weights = weight_bytes(model) / tensor
    if extent.kind == "decode":
        heads = -(-model.kv_heads // tensor)
        widths = [0, *cache_widths(extent.steps)]
        slots = sum(wide * (wide - narrow) for narrow, wide in itertools.pairwise(widths)) / extent.steps
        columns = extent.length + slots * extent.window / extent.steps
        cache = 2 * model.layers * rows * columns * heads * model.head_dim * _item(model)
        return extent.batches * extent.steps * (weights + cache)
    passes = (3 if extent.kind == "train" else 1) * extent.trunks * extent.repeats
    layer = _layer(model, rows, extent.length, tensor)
    return (
        passes * (weights + model.layers * layer) + 7 * extent.trained
    )  # parameters, gradient, two moments: read, written


def weight_bytes(model: ModelConfig) -> int:
    """Of the whole trunk, as it is computed with."""
    return (model.layers * layer_weights(model) + 2 * model.padded_vocab * model.width) * _item(model)


def layer_weights(model: ModelConfig) -> int:
    attention = model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return attention + model.width * model.mlp_width * (3 if model.gated_mlp else 2)


def _item(model: ModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else np.dtype("float32").itemsize
