"""Every family's caches: replies in turn, and in ever fewer rows, are those of a batch that waits for its longest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import decoding, sampling, sharding
from mpo_jax.decoding import SamplingConfig
from mpo_jax.ops import masks
from mpo_jax.types import Batch

STOPS = tuple(range(3, 90, 11))  # so that replies of a random model are of unlike length
P, R, ROWS = 8, 24, 16
FORMS = {
    "llama": SamplingConfig(temperature=0.9, max_new_tokens=R, n=2, stop_ids=STOPS),
    "mistral": SamplingConfig(temperature=0, max_new_tokens=R, stop_ids=STOPS),
    "qwen2_window": SamplingConfig(max_new_tokens=R, n=3, stop_ids=STOPS),
    "gemma2": SamplingConfig(temperature=0.7, top_k=40, top_p=0.95, min_new_tokens=3, max_new_tokens=R, stop_ids=STOPS),
    "gpt_neox": SamplingConfig(max_new_tokens=R, stop_ids=STOPS),
    "gpt2": SamplingConfig(max_new_tokens=R, n=2, stop_ids=STOPS),
}


def prompts() -> Batch:
    """Left-padded prompts of unlike lengths, and two rows that only fill the batch."""
    random = np.random.default_rng(0)
    columns = np.arange(P)[None]
    lengths = random.integers(1, P + 1, ROWS)[:, None]
    real = columns >= P - lengths
    tokens = np.where(real, random.integers(3, 96, (ROWS, P)), 0)
    positions = np.where(real, columns - (P - lengths), 0)
    arrays = (tokens, positions, np.where(real, masks.PROMPT_SEGMENT, 0))
    ids = np.arange(ROWS)
    weight = np.where(np.isin(ids, (4, ROWS - 1)), 0, 1)
    whole = (jnp.asarray(x, jnp.int32) for x in (*arrays, ids, 7 * ids))
    return Batch(*whole, weight=jnp.asarray(weight, jnp.float32), window=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def waiting_for_the_longest(config, settings, weights, prompts):
    """All rows to the end of the longest response, as the sampler was at first."""
    weights = decoding.decode_weights(config, weights)
    layout = decoding.decode_layout(config, weights)
    state = decoding.begin(config, settings, weights, prompts, 5, 1, settings.max_new_tokens)
    state = decoding.advance(config, settings, layout, state, lambda state: jnp.any(decoding.live(state)))
    return state.drawn, state.logps, state.lengths, state.finished, state.decoded


in_turn = jax.jit(sampling.counted, static_argnums=(0, 1, 6))


def check(config, settings, weights, batch, rows, expected) -> int:
    """That replies are those expected; the work of their loops."""
    rollout, work = jax.device_get(in_turn(config, settings, weights, batch, 5, 1, rows))
    tokens, logps, lengths, finished, _ = expected
    shape = (ROWS, settings.n, R)
    drawn, segments, positions = (
        np.asarray(getattr(rollout.batch, name))[:, P:].reshape(shape) for name in ("tokens", "segments", "positions")
    )
    np.testing.assert_array_equal(drawn, tokens)
    np.testing.assert_array_equal((segments > 0).sum(axis=2), lengths)
    np.testing.assert_array_equal(rollout.finished, finished)
    begins = np.asarray(batch.positions)[:, -1] + 1
    np.testing.assert_array_equal(positions[:, :, 0], np.where(lengths > 0, begins[:, None], 0))
    np.testing.assert_allclose(rollout.logps, logps, atol=2e-5)
    return int(work)


@pytest.mark.parametrize(
    "name", [name if name == "gemma2" else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_replies_are_those_of_a_batch_that_waits(random_model, name):
    config, weights = random_model(name)
    settings, batch = FORMS[name], prompts()
    expected = jax.device_get(waiting_for_the_longest(config, settings, weights, batch))
    waited, lengths = int(expected[-1]), expected[2]
    assert 1 < np.median(lengths) < lengths.max(), "replies are of unlike length"
    needed = int(np.maximum(lengths.max(axis=1) - 1, 0).sum())
    assert needed <= check(config, settings, weights, batch, None, expected) < waited
    # Of four places none stays empty for long, but at the end.
    assert check(config, settings, weights, batch, 4, expected) < needed + 4 * (R - 1)


@pytest.mark.parametrize("sizes", [(8, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_replies_are_those_of_one_device(random_model, sizes):
    """Every device has its own queue, and its rows stay with it."""
    mesh = sharding.make_mesh(*sizes)
    config, weights = random_model("gemma2")
    settings, batch = dataclasses.replace(FORMS["llama"], temperature=0.8), prompts()
    expected = jax.device_get(waiting_for_the_longest(config, settings, weights, batch))
    placed = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        for rows in (None, 8) if sizes == (2, 2, 2) else (8,):
            check(config, settings, placed, batch, rows, expected)
