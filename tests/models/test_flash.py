"""The flash backend against the xla one, in value and gradient, on slot and tight rows, on meshes; its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.models import attention, decoder, flash
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import masks
from tests.tpu import compile_for_tpu

LENGTH = 128
QUICK = {"xla_backend_optimization_level": 0}  # with the next, a fifth of the time to compile
if jax.__version__.startswith("0.10."):
    QUICK["xla_cpu_use_fusion_emitters"] = False
CONFIG = ModelConfig("llama", 256, 1, 32, 4, 2, 8, 32, 512)
VARIANTS = {
    "plain": {},
    "window": {"windows": (9,)},
    "softcap": {"attention_softcap": 2.0},
    "window and softcap": {"windows": (20,), "attention_softcap": 2.0, "kv_heads": 1},
}


def tight_row(prompt: int, responses: list[int], length: int = LENGTH, left: int = 0):
    """positions, segments i32 [T] of `left` columns of padding, a prompt and its responses, then padding."""
    positions, segments = np.zeros((2, length), np.int32)
    at = left
    for n, size in enumerate([prompt, *responses]):
        positions[at : at + size] = np.arange(size) + (prompt if n else 0)
        segments[at : at + size] = n + 1
        at += size
    return positions, segments


def slot_row(prompt: int, responses: list[int], slots: flash.Slots):
    """positions, segments i32 [T] of a slot-form row: the prompt left-padded, each response right-padded."""
    length = slots.prompt + slots.responses * slots.length
    positions, segments = np.zeros((2, length), np.int32)
    start = slots.prompt - prompt
    positions[start : slots.prompt] = np.arange(prompt)
    segments[start : slots.prompt] = 1
    for n, size in enumerate(responses):
        at = slots.prompt + n * slots.length
        positions[at : at + size] = prompt + np.arange(size)
        segments[at : at + size] = n + 2
    return positions, segments


def batch(rows):
    positions, segments = zip(*rows, strict=True)
    return np.stack(positions), np.stack(segments)


def tight_batch(responses: int, length: int = LENGTH):
    rows = [
        tight_row(30, [length // (2 * responses) - 2 * n for n in range(responses)], length),
        tight_row(5, [3] * responses, length, left=7),
        tight_row(length - 20 * responses, [20] * responses, length),
        tight_row(0, [], length),  # a filler row
    ]
    return batch(rows)


def slot_batch(slots: flash.Slots):
    full = [slots.length] * slots.responses
    short = [max(slots.length - 3 * (n + 1), 0) for n in range(slots.responses)]
    return batch(
        [slot_row(slots.prompt, full, slots), slot_row(3, short, slots), slot_row(0, [0] * slots.responses, slots)]
    )


def compute(config, positions, segments, slots=None):
    """Values and the gradients of q, k, v, all zero at padding."""
    rows, length = segments.shape
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        rng.standard_normal((rows, length, heads, config.head_dim), np.float32)
        for heads in (config.heads, config.kv_heads, config.kv_heads, config.heads)
    )
    real = (segments > 0)[:, :, None, None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def values_and_gradients(q, k, v):
        masks = attention.row_masks(config, positions, segments)
        context = attention.RowContext(None, None, positions, segments, masks, slots)

        def loss(q, k, v):
            out = attention.attend_rows(config, q, k, v, jnp.int32(0), context)
            return jnp.sum(jnp.where(real, out, 0) * cotangent), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    out, gradients = values_and_gradients(q, k, v)
    found = [np.asarray(x) for x in (out, *gradients)]
    assert all(np.isfinite(x).all() for x in found)
    return [np.where(real, found[0], 0), *found[1:]]


def agree(config, positions, segments, slots=None):
    xla = compute(dataclasses.replace(config, attention="xla"), positions, segments)
    found = compute(dataclasses.replace(config, attention="flash"), positions, segments, slots)
    for name, a, b in zip(("out", "dq", "dk", "dv"), xla, found, strict=True):
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(b, a, atol=2e-5, err_msg=name)


# Every N with every variant would take minutes: interpreted kernels compile slowly.
CASES = [(1, "plain"), (2, "window"), (4, "softcap"), (2, "window and softcap")]


@pytest.mark.parametrize(("responses", "variant"), CASES)
def test_tight_rows_equal_xla(responses, variant):
    agree(dataclasses.replace(CONFIG, **VARIANTS[variant]), *tight_batch(responses))


@pytest.mark.parametrize(("responses", "variant"), CASES)
def test_slot_rows_equal_xla(responses, variant):
    slots = flash.Slots(64, responses, 64 // responses)
    agree(dataclasses.replace(CONFIG, **VARIANTS[variant]), *slot_batch(slots), slots)


@pytest.mark.parametrize("form", ["tight", "slots"])
def test_rows_of_several_tiles(form):
    """384 columns are 3 x 3 tiles: some empty, some full, some where padding begins."""
    config = dataclasses.replace(CONFIG, windows=(150,))
    if form == "tight":
        agree(config, *tight_batch(2, 384))
    else:
        slots = flash.Slots(100, 2, 142)
        agree(config, *slot_batch(slots), slots)


# Meshes (data, fsdp, tensor) and key-value heads: divided by the tensor axis; one for each shard's heads; one that
# two shards share; and 6 heads in 2 groups over 3 shards, where the middle shard reads both.
@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads"), [((2, 1, 2), 4, 2), ((1, 2, 4), 8, 2), ((1, 1, 4), 4, 1), ((2, 1, 3), 6, 2)]
)
def test_on_a_mesh_equals_one_device(sizes, heads, kv_heads):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    config = dataclasses.replace(CONFIG, heads=heads, kv_heads=kv_heads, attention="flash")
    xla = dataclasses.replace(config, attention="xla")
    positions, segments = tight_batch(2)
    expected = compute(xla, positions, segments)
    with jax.set_mesh(mesh):
        found = compute(config, positions, segments)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)


def test_slot_rows_and_indivisible_rows_on_a_mesh():
    slots = flash.Slots(64, 2, 32)
    positions, segments = slot_batch(slots)  # 3 rows on a batch axis of 2
    config = dataclasses.replace(CONFIG, windows=(9,), attention="flash")
    expected = compute(dataclasses.replace(config, attention="xla"), positions, segments)
    with jax.set_mesh(sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])):
        found = compute(config, positions, segments, slots)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)


def test_alternating_windows_of_a_whole_model_with_remat():
    """The decoder of two kinds of layers, rematerialised: hidden states and gradients of the weights equal xla's."""
    config = dataclasses.replace(CONFIG, layers=2, windows=(9, 1 << 30), remat="full")
    weights = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    positions, segments = tight_batch(2)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, segments.shape, np.int32)

    def loss(weights, config):
        hidden = decoder.forward(config, weights, tokens, positions, segments)
        return jnp.sum(jnp.where((segments > 0)[:, :, None], jnp.sin(hidden), 0))

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=QUICK)
    expected, found = (step(weights, dataclasses.replace(config, attention=name)) for name in ("xla", "flash"))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found[1], expected[1])


def test_prefill_of_left_padded_prompts_equals_xla():
    slots = flash.Slots(LENGTH, 0, 0)
    positions, segments = batch([slot_row(LENGTH, [], slots), slot_row(40, [], slots)])
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, segments.shape, np.int32)
    weights = jax.jit(decoder.init, static_argnums=0)(CONFIG, jax.random.key(0))
    prefill = jax.jit(decoder.prefill, static_argnums=(0, 5, 6), compiler_options=QUICK)
    hidden = [
        prefill(dataclasses.replace(CONFIG, attention=name), weights, tokens, positions, segments, 1, 8)[0]
        for name in ("xla", "flash")
    ]
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(hidden[1])[real], np.asarray(hidden[0])[real], atol=2e-5)


def test_slot_mask_is_the_visibility_rule():
    visible = jax.jit(masks.visible)
    for slots in (flash.Slots(6, 3, 4), flash.Slots(5, 1, 13), flash.Slots(18, 0, 0)):
        row = batch([slot_row(slots.prompt, [slots.length] * slots.responses, slots)])
        for window in (1, 3, 7, 100):
            np.testing.assert_array_equal(flash.slot_mask(slots, window), visible(*row, window)[0])
        np.testing.assert_array_equal(flash.slot_mask(slots, None), visible(*row, 100)[0])


def test_what_flash_cannot_do_is_an_input_error():
    config = dataclasses.replace(CONFIG, attention="flash")
    positions, segments = tight_batch(1)
    with pytest.raises(InputError, match=r"found 100 \(set data.multiple=128"):
        compute(config, positions[:, :100], segments[:, :100])
    with pytest.raises(InputError, match="does not make up rows of 128"):
        compute(config, positions, segments, flash.Slots(64, 1, 32))
    with pytest.raises(InputError, match="tensor=3 divides; found 4"):
        config.check_attention("tpu", tensor=3)
    with pytest.raises(InputError, match="no soft cap; set attention=xla"):
        dataclasses.replace(config, attention_softcap=30.0, dtype="bfloat16").check_attention("gpu")
    with pytest.raises(InputError, match="dtype=bfloat16; found float32"):
        config.check_attention("gpu")
    dataclasses.replace(config, dtype="bfloat16").check_attention("gpu", row_len=100)
    dataclasses.replace(config, attention="xla").check_attention("tpu", tensor=3, row_len=100)


TPU_STEP = """
import dataclasses
from mpo_jax.models import decoder, flash
from mpo_jax.models.config import ModelConfig

base = ModelConfig("llama", 1024, 1, 256, 8, 2, 64, 256, 4096, dtype="bfloat16", attention="flash")

def step(config, mesh, rows, length, slots):
    config = config.for_mesh(mesh)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    shardings = sharding.tree_shardings(shapes, mesh)
    weights = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    row = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def loss(weights, tokens, positions, segments):
        hidden = decoder.forward(config, weights, tokens, positions, segments, slots)
        return jnp.sum(jnp.where((segments > 0)[:, :, None], hidden, 0).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        return compiled(jax.value_and_grad(loss), weights, row, row, row)

def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')
"""


def test_compiles_for_tpu():
    """Forward and gradient over 2 x 2 x 2 chips: three kernels, none of them run twice."""
    report = compile_for_tpu(
        TPU_STEP
        + """
config = dataclasses.replace(base, windows=(100,), attention_softcap=30.0)
report["tight"] = kernels(step(config, mesh(2, 2, 2), 8, 512, None))
report["slots"] = kernels(step(config, mesh(2, 2, 2), 8, 512, flash.Slots(256, 2, 128)))
"""
    )
    assert report == {"tight": 3, "slots": 3}


@pytest.mark.slow
def test_compiles_for_tpu_whatever_the_heads_windows_and_remat():
    report = compile_for_tpu(
        TPU_STEP
        + """
variants = {
    "head_dim 8": {"head_dim": 8}, "head_dim 80": {"head_dim": 80}, "head_dim 96": {"head_dim": 96},
    "head_dim 128": {"head_dim": 128}, "head_dim 256": {"head_dim": 256},
    "one key-value head": {"kv_heads": 1}, "as many key-value heads": {"kv_heads": 8},
    "two windows": {"layers": 2, "windows": (100, 1 << 30)}, "remat": {"remat": "full"}, "f32": {"dtype": "float32"},
}
for name, fields in variants.items():
    config = dataclasses.replace(base, **fields)
    for slots in (None, flash.Slots(256, 2, 128)):
        report[f"{name}, {slots}"] = kernels(step(config, mesh(2, 2, 2), 8, 512, slots))
"""
    )
    assert len(report) == 20
    for name, count in report.items():
        # A second window's kernels are a branch beside the first's; remat runs the forward kernel again.
        assert count == (6 if "two windows" in name else 4 if "remat" in name else 3), (name, count)


@pytest.mark.slow
def test_memory_on_tpu_holds_no_logits():
    """Attention as wide as LLaMA-2-7B's: temporary bytes of forward and gradient, against [B,H,T,T] logits and
    xla's blocks of them.

    Slot rows are linear in their length; tight rows hold the masks of one row, [T,T]. What finds room on the core is in
    no figure, so growth is compared with growth: 2 is linear, 4 quadratic.
    """
    report = compile_for_tpu(
        TPU_STEP
        + """
wide = dataclasses.replace(base, heads=32, kv_heads=32, head_dim=128, remat="full")

def temporary(backend, length, slots=None):
    program = step(dataclasses.replace(wide, attention=backend), mesh(1, 4, 2), 4, length, slots)
    return program.memory_analysis().temp_size_in_bytes

report["tight"] = temporary("flash", 4096)
report["slots"] = temporary("flash", 4096, flash.Slots(2048, 2, 1024))
report["slots 2048"] = temporary("flash", 2048, flash.Slots(1024, 2, 512))
report["slots 8192"] = temporary("flash", 8192, flash.Slots(4096, 2, 2048))
report["xla"] = temporary("xla", 4096)
"""
    )
    print(report)
    assert report["slots 8192"] - report["slots"] < 2.75 * (report["slots"] - report["slots 2048"])
    logits = 4 * (32 // 2) * 4096**2  # bytes of [H,T,T] in float32, of a chip's row and heads
    assert report["slots"] < report["tight"] < min(logits / 4, report["xla"] / 2)
