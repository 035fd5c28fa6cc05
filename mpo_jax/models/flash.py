"""Takes queries, keys and values of whole rows; gives attended values without a [B,H,T,T] array of logits.

On TPU: Pallas splash attention inside shard_map, rows over data and fsdp, heads over tensor (on CPU the same kernels in
interpret mode, for tests). On GPU: cuDNN, as `models.attention` calls it. Letters: B rows, T row length, N responses, P
prompt slots, R response slots, H heads, K key-value heads, D head_dim.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mpo_jax.errors import InputError
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import masks
from mpo_jax.sharding import BATCH_AXES, axis_size, current_mesh

_HEAD_AXIS = "tensor"
_BLOCKS = (512, 256, 128)  # columns of a kernel's tile: the largest that divides the row
_SAVED = "flash_attention"  # the checkpoint name of what the backward pass keeps: outputs and their log-sum-exps


class Slots(NamedTuple):
    """A slot-form row: the prompt ends at column `prompt`, then `responses` responses of `length` columns each."""

    prompt: int
    responses: int
    length: int


def attend(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: int | None,
    slots: Slots | None,
) -> jax.Array:
    """Attention under the visibility rule: q [B,T,H,D], k and v [B,T,K,D] -> [B,T,H,D] in q's dtype.

    positions, segments i32 [B,T]; window: a key is visible if its position is less than this behind (None: no limit).
    slots: the columns of slot-form rows, so that the mask is a constant and its empty tiles aren't in the grid; rows
    without (tight ones) build their mask from positions and segments, one row at a time. Values at padding are finite
    and mean nothing. Raises InputError for what the backend can't compute.
    """
    rows, length = segments.shape
    if slots is not None and slots.prompt + slots.responses * slots.length != length:
        raise InputError(f"flash attention: {slots} does not make up rows of {length} columns")
    mesh = current_mesh()
    shards = 1 if mesh is None else axis_size(mesh, _HEAD_AXIS)
    where = platform()
    config.check_attention(where, shards, length)
    if where not in ("cpu", "tpu"):
        return cudnn(config, q, k, v, masks.visible(positions, segments, window))
    interpret = where == "cpu"
    local = functools.partial(_local, config, window, slots, interpret)
    if mesh is None:
        return local(q, k, v, positions, segments, None)
    # Like `constrain`: rows that the mesh doesn't divide are computed everywhere.
    batch = BATCH_AXES if rows % axis_size(mesh, BATCH_AXES) == 0 else None
    split_kv = config.kv_heads % shards == 0
    by_head = PartitionSpec(batch, None, _HEAD_AXIS, None)
    kv_spec = by_head if split_kv else PartitionSpec(batch, None, None, None)
    row_spec = PartitionSpec(batch, None)

    def on_shard(q, k, v, positions, segments):
        return local(q, k, v, positions, segments, None if split_kv else jax.lax.axis_index(_HEAD_AXIS))

    # The kernels' outputs don't say which mesh axes they vary over, hence check_vma=False.
    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(by_head, kv_spec, kv_spec, row_spec, row_spec),
        out_specs=by_head,
        check_vma=False,
    )(q, k, v, positions, segments)


def platform() -> str:
    """Where the program will run: on the devices of `jax.set_mesh`, else on the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def cudnn(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """cuDNN's fused attention: q [B,T,H,D], k and v [B,T,K,D], mask bool [B,T,T] -> [B,T,H,D].

    A boolean mask, not a bias: JAX from 0.11 on knows that nobody wants its gradient. cuDNN's backward pass takes even
    row lengths alone, so an odd row gets a column that nothing sees.
    """
    length = q.shape[1]
    if length % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        mask = jnp.pad(mask, ((0, 0), (0, 1), (0, 1))).at[:, -1, -1].set(True)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=config.scale, implementation="cudnn")
    return out[:, :length]


def _local(config, window, slots, interpret, q, k, v, positions, segments, shard) -> jax.Array:
    """Attention of one device's rows and heads. shard: i32 [], which part of the heads these are, where k and v hold
    every key-value head and not only those that belong to them."""
    if shard is not None:
        k, v = (_own_kv_heads(config, x, q.shape[2], shard) for x in (k, v))
    q = (q * jnp.asarray(config.scale, jnp.float32)).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # the kernels want [heads, T, D]
    kernel = functools.partial(_kernel, config.attention_softcap, interpret)
    if slots is not None:
        # Segment ids test equality alone: they part padding from what is real, the constant mask does the rest.
        attention = kernel(np.broadcast_to(slot_mask(slots, window), (q.shape[1], *[q.shape[2]] * 2)))
        out = jax.vmap(attention)(q, k, v, _real(segments))
        return out.swapaxes(1, 2)

    # Kept for the backward pass: the outputs. The mask of a row is built again, so that [B,T,T] never exists.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_SAVED))
    def one_row(q, k, v, positions, segments):
        return kernel(masks.visible(positions[None], segments[None], window))(q, k, v)

    return jax.lax.map(lambda row: one_row(*row), (q, k, v, positions, segments)).swapaxes(1, 2)


def _own_kv_heads(config: ModelConfig, x: jax.Array, heads: int, shard: jax.Array) -> jax.Array:
    """The key-value heads of this shard's `heads` query heads: [B,T,K,D] -> [B,T,K',D], K' dividing `heads`."""
    group = config.heads // config.kv_heads
    if group % heads == 0:  # all of them read one head
        return jax.lax.dynamic_slice_in_dim(x, shard * heads // group, 1, axis=2)
    return jnp.take(x, (shard * heads + jnp.arange(heads, dtype=jnp.int32)) // group, axis=2)


def _real(segments: jax.Array):
    """Segment ids, as the kernels take them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # see `_kernel`

    real = (segments > 0).astype(jnp.int32)
    return splash.SegmentIds(q=real, kv=real)


def _kernel(softcap: float | None, interpret: bool, mask: np.ndarray | jax.Array) -> Callable:
    """Splash attention under a mask: bool [heads or 1, T, T], a constant (NumPy) or computed (jax)."""
    # Pallas is a tenth of a command's start, and only programs with these kernels need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    block = next(size for size in _BLOCKS if mask.shape[-1] % size == 0)
    kernel = splash.make_splash_mha(
        mask,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=_SAVED,
        interpret=interpret,
    )
    # Under jit this flag has become a traced value, which the kernel then asks for its truth; only its name for the
    # profiler depends on it.
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=None))
    return kernel


@functools.lru_cache(maxsize=16)
def slot_mask(slots: Slots, window: int | None) -> np.ndarray:
    """The visibility rule of slot-form rows where nothing is padding: bool [T,T] (query, key).

    A prompt ends at its last column, so positions differ as columns do within a prompt or a response; response token j
    is P + j - c behind prompt column c.
    """
    column = np.arange(slots.prompt + slots.responses * slots.length)
    behind_prompt = column - slots.prompt
    response = np.where(behind_prompt < 0, -1, behind_prompt // max(slots.length, 1))
    position = np.where(behind_prompt < 0, column, slots.prompt + behind_prompt % max(slots.length, 1))
    query, key = response[:, None], response[None, :]
    allowed = np.tri(len(column), dtype=bool) & ((key == query) | (key == -1))
    if window is not None:
        allowed &= position[:, None] - position[None, :] < window
    return allowed
