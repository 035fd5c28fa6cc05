"""Row attention with its own derivative, against `jax.nn.dot_product_attention` and plain autodiff of the formula."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.errors import InputError
from mpo_jax.models import attention
from mpo_jax.models.config import ModelConfig
from mpo_jax.models.flash import Slots
from mpo_jax.ops import masks

CONFIG = ModelConfig("llama", 96, 1, 64, 4, 2, 16, 96, 1024)


def rows(length, seed=0):
    """Queries, keys and values of three rows in which two responses follow a prompt, padding first, last or nowhere."""
    random = np.random.default_rng(seed)
    q, k, v, cotangent = (
        jnp.asarray(random.normal(size=(3, length, heads, 16)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    third = length // 3
    whole = np.repeat([1, 2, 3], [length - 2 * third, third, third])
    early, late = whole.copy(), whole.copy()
    early[: third // 2] = 0
    late[-third // 2 :] = 0
    segments = jnp.asarray(np.stack([whole, early, late]), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (3, length))
    return q, k, v, cotangent, positions, segments


def plain(config, q, k, v, mask):
    """Softmax of masked logits, as written on paper."""
    k, v = (jnp.repeat(x, config.heads // config.kv_heads, axis=2) for x in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * config.scale
    if config.attention_softcap is not None:
        logits = config.attention_softcap * jnp.tanh(logits / config.attention_softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def library(config, q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=config.scale)


def with_gradients(function, q, k, v, cotangent):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("length", [21, 64, 200, 1100], ids=lambda length: f"{length} columns")
@pytest.mark.parametrize(
    ("expected", "changes", "window"),
    [(library, {}, None), (plain, {"attention_softcap": 2.0}, None), (plain, {"attention_scale": 0.1}, 7)],
    ids=["library", "soft cap", "window"],
)
def test_outputs_and_gradients_are_those_of_the_formula(expected, changes, window, length):
    windows = None if window is None else (window,)
    config = dataclasses.replace(CONFIG, windows=windows, **changes)
    q, k, v, cotangent, positions, segments = rows(length)
    mask = masks.visible(positions, segments, window)
    context = attention.RowContext(None, None, positions, segments, attention.row_masks(config, positions, segments))

    def ours(q, k, v):
        return attention.attend_rows(config, q, k, v, jnp.int32(0), context)

    found = jax.jit(lambda *given: with_gradients(ours, *given))(q, k, v, cotangent)
    wanted = jax.jit(lambda *given: with_gradients(lambda q, k, v: expected(config, q, k, v, mask), *given))(
        q, k, v, cotangent
    )
    for name, mine, theirs in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, err_msg=name)


def test_blocks_cover_every_column_once_and_are_few():
    for length in (1, 63, 64, 65, 192, 384, 1000, 4096):
        blocks = attention._blocks(length)
        assert [column for begin, end in blocks for column in range(begin, end)] == list(range(length))
        assert len(blocks) <= 8


def test_the_backward_pass_keeps_nothing_that_grows_with_the_square_of_the_length():
    """Residuals of a row of T columns: linear in T but for the mask, one byte a pair of columns."""
    sizes = []
    for length in (256, 512):
        q, k, v, _, positions, segments = rows(length)
        context = attention.RowContext(
            None, None, positions, segments, attention.row_masks(CONFIG, positions, segments)
        )
        _, pull = jax.eval_shape(
            lambda q, k, v, c=context: jax.vjp(
                lambda q, k, v: attention.attend_rows(CONFIG, q, k, v, jnp.int32(0), c), q, k, v
            ),
            q, k, v,
        )  # fmt: skip
        kept = [x for x in jax.tree.leaves(pull) if x.dtype != bool]
        sizes.append(sum(x.size for x in kept))
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)


def lowered(rows: int, heads: int, groups: int, length: int, width: int, slots: Slots | None = None):
    """Attention of rows of `length` columns, `groups` query heads of `width` to each of `heads` key heads."""
    queries = jax.ShapeDtypeStruct((rows, length, heads * groups, width), jnp.float32)
    keys = jax.ShapeDtypeStruct((rows, length, heads, width), jnp.float32)
    positions = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    config = dataclasses.replace(CONFIG, heads=heads * groups, kv_heads=heads, head_dim=width)

    def attend(q, k, v, positions, segments):
        masked = attention.row_masks(config, positions, segments)
        context = attention.RowContext(None, None, positions, segments, masked, slots)
        return attention.attend_rows(config, q, k, v, jnp.int32(0), context)

    return jax.jit(attend).lower(queries, keys, keys, positions, positions)


def test_on_a_cpu_the_forward_pass_writes_no_logits():
    """XLA fuses a block's two products with the softmax between them, which it then spreads over the cores, as long as
    nothing between them is a selection or has other axes. docs/benchmarks.md says what that gains."""
    rows, heads, groups, length, width = 16, 3, 2, 192, 32
    text = lowered(rows, heads, groups, length, width).compile().as_text()
    _, written = text.split("\nENTRY ")
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]", written)]
    assert rows * length * heads * groups * width in sizes
    assert max(sizes) < rows * heads * groups * 64 * length  # a block's logits


def test_rows_of_responses_alone_are_filled_up_to_whole_blocks():
    """Of 80 columns: a block of 64, and one of 16 or, so that the columns that follow change no bits, of 64."""
    tight, prompts, responses = (lowered(2, 3, 2, 80, 16, slots) for slots in (None, Slots(80, 0, 0), Slots(48, 2, 16)))

    def logits(found) -> list[int]:
        """Columns of the blocks' logits, queries times keys."""
        shapes = re.findall(r"dot_general.*-> tensor<2x3x(\d+)x(\d+)xf32>", found.as_text())
        return [int(queries) // 2 * int(keys) for queries, keys in shapes if int(keys) != 16]

    assert logits(tight) == logits(prompts) == [64 * 64, 16 * 80]
    assert logits(responses) == [64 * 64, 64 * 128]


# Which backend -------------------------------------------------------------------------------------------------------

GPU = {"platform": "gpu", "devices": 1, "capability": (9, 0)}


@pytest.mark.parametrize(
    ("setting", "changes", "where", "backend", "why"),
    [
        ("auto", {}, GPU, "cudnn", "cuDNN can compute this model"),
        ("auto", {}, GPU | {"capability": None}, "cudnn", "cuDNN can compute this model"),
        ("auto", {}, {"platform": "cpu"}, "xla", "cuDNN is not on cpu"),
        ("auto", {}, {"platform": "tpu"}, "xla", "cuDNN is not on tpu"),
        ("auto", {}, GPU | {"devices": 8}, "xla", "several GPUs"),
        ("auto", {"dtype": "float32"}, GPU, "xla", "needs dtype=bfloat16; found float32"),
        ("auto", {"attention_softcap": 50.0}, GPU, "xla", "no soft cap"),
        ("auto", {"head_dim": 12}, GPU, "xla", "multiple of 8 up to 256; found 12"),
        ("auto", {"head_dim": 256}, GPU, "cudnn", "cuDNN can compute this model"),
        ("auto", {"head_dim": 256}, GPU | {"capability": (8, 6)}, "xla", "multiple of 8 up to 128; found 256"),
        ("auto", {}, GPU | {"capability": (7, 5)}, "xla", "needs compute capability 8.0 (Ampere) or later; found 7.5"),
        ("xla", {}, GPU, "xla", "model.attention=xla asks for it"),
        ("cudnn", {"dtype": "float32"}, GPU, "cudnn", "model.attention=cudnn asks for it"),
        ("flash", {}, {"platform": "tpu"}, "flash", "model.attention=flash asks for it"),
    ],
)
def test_one_function_says_which_backend_and_why(setting, changes, where, backend, why):
    model = ModelConfig("llama", 256, 1, 128, 2, 2, 64, 128, 256, dtype="bfloat16")
    found = attention.choose(setting, dataclasses.replace(model, **changes), **where)
    assert found.backend == backend and why in found.why


def test_a_backend_that_is_named_and_can_not_be_is_an_input_error():
    model = ModelConfig("llama", 256, 1, 128, 2, 2, 64, 128, 256)
    with pytest.raises(InputError, match=r"attention: 'fast'; expected one of \['auto', 'xla', 'flash', 'cudnn'\]"):
        attention.choose("fast", model, "gpu")
    model = dataclasses.replace(model, attention="cudnn")
    with pytest.raises(InputError, match="cudnn runs on NVIDIA GPUs alone; found cpu; set attention=auto"):
        model.check_attention("cpu")
    with pytest.raises(InputError, match="which needs dtype=bfloat16; found float32; set attention=xla"):
        model.check_attention("gpu")


def test_the_compute_capability_is_read_from_a_gpu_alone():
    class Card:
        compute_capability = "9.0"

    assert attention.compute_capability(Card()) == (9, 0)
    assert attention.compute_capability(jax.devices()[0]) is None
