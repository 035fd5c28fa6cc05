"""The flash backend against the xla one, in value and gradient, on slot and tight rows, on meshes; its errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import attention, flash
from mpo_jax.models.config import ModelConfig

LENGTH = 128
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
    return jnp.asarray(np.stack(positions)), jnp.asarray(np.stack(segments))


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


def compute(config, positions, segments, slots=None, seed=0):
    """Values and the gradients of q, k, v, all zero at padding."""
    rows, length = segments.shape
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v, cotangent = (
        jax.random.normal(key, (rows, length, heads, config.head_dim))
        for key, heads in zip(keys, (config.heads, config.kv_heads, config.kv_heads, config.heads), strict=True)
    )
    real = (segments > 0)[:, :, None, None]

    @jax.jit
    def values_and_gradients(q, k, v):
        masks = attention.row_masks(config, positions, segments)
        context = attention.RowContext(None, None, positions, segments, masks, slots)

        def loss(q, k, v):
            out = attention.attend_rows(config, q, k, v, jnp.int32(0), context)
            return jnp.sum(jnp.where(real, out, 0) * cotangent), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    out, gradients = values_and_gradients(q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *gradients))
    return [np.asarray(x) for x in (jnp.where(real, out, 0), *gradients)]


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
