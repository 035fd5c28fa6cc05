"""Replies of unlike length enter; which of them are computed together, how wide, and that nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import scoring, sharding
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import gradients
from mpo_jax.stages.ppo import experience, narrow, update
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.types import Experience
from tests.stages import made_rollout

MODEL = ModelConfig("llama", 100, 1, 32, 4, 2, 8, 64, 160)
P, R = 33, 80
LENS = np.array([[20, 3], [75, 5], [4, 2], [60, 31], [0, 0], [9, 30], [31, 1], [50, 40]])
B, N = LENS.shape


def made_up() -> experience.Rollout:
    return made_rollout.rollout(np.arange(B), LENS, P, R)


def random_experience() -> Experience:
    rollout = made_up()
    draws = jax.random.normal(jax.random.key(7), (5, B, N, R))
    inside = experience.response_mask(rollout)
    return Experience(rollout, *(jnp.where(inside, x, jnp.float32(0)) for x in draws), jnp.zeros((B, N)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((64, 1, 128), [32, 64, 96, 128]),
        ((384, 1, 512), [128, 256, 384, 512]),
        ((64, 4, 128), [32, 64, 96, 128]),
        ((64, 1, 32), [32]),
        ((33, 1, 48), [32, 48]),
        ((33, 2, 80), [32, 64, 80]),
        ((64, 2, 37), [16, 32, 37]),
        ((512, 1, 512, 128), [128, 256, 384, 512]),
        ((512, 4, 96, 128), [32, 64, 96]),
    ],
)
def test_widths(given, expected):
    """At most four, 32 columns of a row apart or more; with flash attention, of whole tiles."""
    assert narrow.widths(*given) == expected


def test_a_microbatch_holds_replies_of_like_length():
    rows = jnp.asarray([6, 1, 3, 0, 7, 2], jnp.int32)  # a minibatch of some of a rollout's rows
    lengths = narrow.longest(made_up())
    np.testing.assert_array_equal(lengths, LENS.max(axis=1))
    order = narrow.alike(rows, lengths, 3)
    dealt = gradients.split_batch({"lengths": lengths[order], "rows": order}, 3)
    np.testing.assert_array_equal(np.sort(dealt["lengths"], axis=1), [[4, 20], [31, 50], [60, 75]])
    assert sorted(np.asarray(order)) == sorted(np.asarray(rows))


@pytest.mark.parametrize("rows", [[4], [2, 4], [0, 6], [7, 5], [3, 2], [1], [0, 1]])
def test_a_microbatch_is_as_wide_as_its_longest_reply(rows):
    def told(params, frozen, part, key):
        return params, jnp.float32(part.old_logps.shape[2]), jnp.sum(part.rollout.batch.weight), {}

    part = update.take_rows(random_experience(), jnp.asarray(rows))
    _, width, weight, _ = jax.jit(narrow.in_widths(MODEL, told))({}, {}, part, jax.random.key(0))
    longest = LENS[rows].max()
    possible = narrow.widths(P, N, R)
    assert possible == [32, 64, 80] and width == min(each for each in possible if each >= longest)
    assert weight == (LENS[rows].max(axis=1) > 0).sum()


def updated(microbatch: int, narrows: bool, **given):
    """Weights and metrics after the update of a step."""
    settings = Settings(
        batch_size=B,
        samples=N,
        max_new_tokens=R,
        minibatches=2,
        inner_epochs=2,
        learning_rate=1e-3,
        microbatch=microbatch,
        **given,
    )
    trunk = decoder.init(MODEL, jax.random.key(0), head=True)
    value = {"head": trunk.pop("head")}
    if settings.critic == "separate":
        value["params"] = {name: leaf for name, leaf in trunk["params"].items() if name != "lm_head"}
    params = {"policy": trunk, "value": value}
    optimizer, _ = update.make_optimizer(settings, 4)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = gradients.init_state(optimizer, params, jax.random.key(5), mesh, update.first_extra(settings))
    run = jax.jit(update.make_update(settings, MODEL, optimizer, narrows))
    state, metrics = run(state, {"base": {}}, random_experience(), jnp.float32(0))
    return state.params, metrics


@pytest.mark.parametrize(
    ("microbatch", "given"),
    [(2, {}), (1, {"target_kl": 1e6, "entropy": 0.1, "kl_term": "k2", "critic": "shared"})],
    ids=["plain", "all terms"],
)
def test_an_update_is_the_same_in_narrow_microbatches(microbatch, given):
    whole, before = updated(0, False, **given)
    parts, after = updated(microbatch, True, **given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), whole, parts)
    one_token = 1 / LENS.sum()
    for name, value in before.items():
        near = 2 * one_token if name.endswith("fraction") else 2e-5
        np.testing.assert_allclose(value, after[name], rtol=2e-4, atol=near, err_msg=name)


def bits(dtype: str) -> float:
    """The largest difference between log-probs of rows and of the same rows cut behind their last token."""
    model = dataclasses.replace(MODEL, dtype=dtype)
    weights = decoder.init(model, jax.random.key(0))
    read = jax.jit(
        lambda rollout: scoring.response_logps(model, weights, rollout.batch, slots=experience.slots_of(rollout)).logps
    )
    short = update.take_rows(random_experience(), jnp.flatnonzero(LENS.max(axis=1) <= 32))
    whole = read(short.rollout).reshape(-1, N, R)
    return max(
        float(jnp.max(jnp.abs(whole[:, :, :width] - read(narrow.narrowed(short, width).rollout).reshape(-1, N, width))))
        for width in narrow.widths(P, N, R)
        if width >= 32
    )


def test_a_cut_row_has_the_same_log_probs():
    assert bits("float32") <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_a_cut_row_keeps_its_bits(dtype):
    """So that the ratio of the first update is 1. Seen on processors with AVX512."""
    assert bits(dtype) == 0
