"""A policy over two tokens and a score for each of its four replies enter; PPO and RLOO are held against the optimum.

Reward minus beta * KL(policy || reference) is greatest at reference * exp(reward / beta), normalised (Rafailov et al.
2023, eq. 4): here a distribution over four sequences, in closed form. Rollouts, experience and update are the stage's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import optim, sampling
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import loop
from mpo_jax.stages.ppo import experience
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.stages.ppo.update import make_update
from mpo_jax.types import Batch, Rollout

MODEL = ModelConfig("llama", 2, 1, 8, 1, 1, 8, 16, 8)
REPLIES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32)
SCORES = np.array([0.0, 0.3, 0.7, -0.2], np.float32)
BETA, ROWS = 0.5, 128
SETTINGS = {"inner_epochs": 2, "value_clip": 0.0, "gamma": 1.0, "whiten": False}


def prompts(rows: int) -> Batch:
    ids = jnp.arange(rows, dtype=jnp.int32)
    column = jnp.zeros((rows, 1), jnp.int32)
    return Batch(column, column, column + 1, ids, ids, jnp.ones(rows, jnp.float32), window=0)


def every_reply() -> Rollout:
    """One prompt with all four replies."""
    zeros = jnp.zeros((1, 1), jnp.int32)
    batch = Batch(
        tokens=jnp.concatenate([zeros, REPLIES.reshape(1, 8)], axis=1),
        positions=jnp.asarray([[0] + [1, 2] * 4], jnp.int32),
        segments=jnp.asarray([[1, 2, 2, 3, 3, 4, 4, 5, 5]], jnp.int32),
        id=zeros[0],
        prompt_id=zeros[0],
        weight=jnp.ones(1, jnp.float32),
        window=8,
    )
    return Rollout(batch, jnp.zeros((1, 4, 2), jnp.float32), jnp.zeros((1, 4), bool))


def distribution(weights) -> jax.Array:
    """f32 [4]: the exact probability of each reply."""
    seen = experience.policy_view(MODEL, {"policy": weights}, {}, every_reply(), Settings())
    return jnp.exp(seen.logps.sum(axis=2))[0]


def weights(seed: int, spread: float):
    """A random decoder whose output matrix is `spread` times its usual size."""
    made = decoder.init(MODEL, jax.random.key(seed))
    kernel = made["params"]["lm_head"]["kernel"]
    return {"params": made["params"] | {"lm_head": {"kernel": spread * kernel}}}


@functools.cache
def training(algorithm: str, updates: int, target_kl: float = 0.0, bad: int = -1):
    """Jitted `(first policy, reference) -> f32 [updates,4]`, the policy after each update; compiled once for both
    starts. bad: an update whose scores are NaN, and which is to be skipped."""
    samples = 4 if algorithm == "rloo" else 1
    rows = ROWS // samples
    settings = Settings(algorithm=algorithm, samples=samples, batch_size=rows, **SETTINGS)
    more = {"target_kl": target_kl, "on_nonfinite": "stop" if bad < 0 else "skip"}
    settings = settings.model_copy(update=more)  # a target below 0 too, which no run may have
    how = SamplingConfig(max_new_tokens=2, n=samples)
    names = ("policy", "value") if algorithm == "ppo" else ("policy",)
    rate = optim.schedule("linear", 1e-2, 0, updates * settings.inner_epochs, 0.1)
    optimizer = optim.by_label({name: optim.make_optimizer(rate, clip_norm=1.0) for name in names})
    update = make_update(settings, MODEL, optimizer, narrows=False)
    table = jnp.asarray(SCORES)

    @jax.jit
    def run(policy, reference):
        params = {"policy": policy}
        if algorithm == "ppo":
            critic = decoder.init(MODEL, jax.random.key(9), head=True)
            params["value"] = {
                "params": {k: v for k, v in critic["params"].items() if k != "lm_head"},
                "head": critic["head"],
            }
        state = loop.TrainState(
            jnp.int32(0), params, optimizer.init(params), jax.random.key(5), {"kl_coefficient": jnp.float32(BETA)}
        )

        def step(state, number):
            rollout = sampling.sample(MODEL, how, state.params["policy"], prompts(rows), 3, number)
            drawn = rollout.batch.tokens[:, 1:].reshape(rows, samples, 2)
            scores = jnp.where(number == bad, jnp.nan, table[2 * drawn[:, :, 0] + drawn[:, :, 1]])
            frozen = {"base": {}, "reference": reference}
            made, metrics = experience.make(
                MODEL, settings, None, state.params, frozen, rollout, scores, state.extra["kl_coefficient"]
            )
            state, _ = update(state, frozen, made, metrics["kl"])
            return state, distribution(state.params["policy"])

        return jax.lax.scan(step, state, jnp.arange(updates))[1]

    return run


def test_a_target_kl_that_is_never_reached_changes_nothing():
    """With one, every update is a branch of a condition; without, there is none. The first update's KL is 0."""
    start = weights(2, 4.0), weights(1, 1.0)
    without, beyond, at_once = (training("rloo", 3, target)(*start) for target in (0.0, 1e9, -1e-9))
    np.testing.assert_allclose(without, beyond, atol=1e-6)
    assert np.abs(np.asarray(without - at_once)).max() > 1e-4, "the rest of a step's updates is skipped"


@pytest.mark.parametrize("target_kl", [0.0, 1e9])
def test_a_skipped_step_leaves_the_policy_where_it_was(target_kl):
    start = weights(2, 4.0), weights(1, 1.0)
    whole, skipping = training("rloo", 3, target_kl)(*start), training("rloo", 3, target_kl, bad=1)(*start)
    np.testing.assert_allclose(skipping[0], whole[0], atol=1e-6)
    np.testing.assert_array_equal(skipping[1], skipping[0])
    assert np.isfinite(skipping).all() and np.abs(np.asarray(skipping[2] - skipping[1])).max() > 1e-4


STARTS = {"the reference": (1, 1.0), "elsewhere": (2, 4.0)}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "start"),
    [
        pytest.param("ppo", "the reference", marks=SLOW),
        pytest.param("ppo", "elsewhere", marks=SLOW),
        pytest.param("rloo", "the reference", marks=SLOW),
        ("rloo", "elsewhere"),
    ],
)
def test_reaches_the_optimum_in_closed_form(algorithm, start):
    reference = weights(1, 1.0)
    first = weights(*STARTS[start])
    before = np.asarray(distribution(first), np.float64)
    optimum = np.asarray(distribution(reference), np.float64) * np.exp(SCORES.astype(np.float64) / BETA)
    optimum /= optimum.sum()
    assert 0.5 * np.abs(before - optimum).sum() > 0.1, "the start must not be the optimum"
    found = np.asarray(training(algorithm, 500)(first, reference), np.float64)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert 0.5 * np.abs(found[-100:].mean(axis=0) - optimum).sum() < 0.02
