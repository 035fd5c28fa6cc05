"""Takes rewards, advantages and the KL coefficient's rule; gives proof by hand, by identities and by brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.ops import returns

NAN, INF = float("nan"), float("inf")
SHAPE = (2, 3, 6)


def f32(*values):
    return jnp.asarray(values, jnp.float32)


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=atol)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32))


def prefixes(lens):
    return jnp.arange(SHAPE[2])[None, None] < jnp.asarray(lens)[:, :, None]


MASK = prefixes([[6, 3, 1], [4, 0, 5]])


def test_normalise_by_hand():
    # (3 - 1) / 2, (0.5 - 1) / 2, (11 - 1) / 2 held to 3, and the same below.
    scores = f32([3.0, 0.5, 11.0, -9.0])
    close(returns.normalise(scores, 1.0, 2.0), [[1.0, -0.25, 5.0, -5.0]])
    close(returns.normalise(scores, 1.0, 2.0, clip=3.0), [[1.0, -0.25, 3.0, -3.0]])
    assert np.isnan(returns.normalise(f32([NAN]), 0.0, 1.0, clip=1.0)).all()  # the stage must see it
    assert np.isfinite(returns.normalise(f32([1.0]), 1.0, 0.0)).all()


def test_kl_rewards_by_hand():
    scores = f32([0.7, -1.0, NAN])
    logps = f32([[-1.0, -2.0, -3.0], [-1.0, -0.5, NAN], [NAN, INF, NAN]])
    reference = f32([[-1.5, -1.0, -3.0], [-3.0, -0.5, 0.0], [0.0, 0.0, NAN]])
    mask = jnp.asarray([[[1, 1, 1], [1, 1, 0], [0, 0, 0]]], bool)
    finished = jnp.asarray([[True, False, False]])
    out = returns.kl_rewards(scores, logps, reference, mask, finished, 0.1, missing_eos_penalty=2.0)
    # -0.1 * (0.5, -1, 0), the score 0.7 on the third; -0.1 * (2, 0), -1 - 2 on the second; nothing.
    close(out, [[[-0.05, 0.1, 0.7], [-0.2, -3.0, 0.0], [0.0, 0.0, 0.0]]])
    # Summed: score less the response's KL, what RLOO takes. 0.7 - 0.1 * -0.5; -3 - 0.1 * 2.
    close(jnp.sum(out, axis=2), [[0.75, -3.2, 0.0]])


def test_fractional_scores_arrive_unrounded():
    scores, mask = f32([0.7, 0.3, -0.1], [1e-3, 0.25, 99.9]), MASK
    nothing = jnp.zeros(SHAPE, jnp.float32)
    rewards = returns.kl_rewards(scores, nothing, nothing, mask, jnp.ones((2, 3), bool), 0.1)
    advantages, _ = returns.gae(rewards, nothing, mask, 1.0, 1.0)
    wanted = np.where(np.asarray(mask), np.asarray(scores)[:, :, None], 0)
    np.testing.assert_array_equal(np.asarray(advantages), wanted)
    with pytest.raises(ValueError, match="scores is int32"):
        returns.kl_rewards(scores.astype(jnp.int32), nothing, nothing, mask, jnp.ones((2, 3), bool), 0.1)


def test_gae_by_hand():
    rewards, values = f32([[1.0, 0.0, 2.0, NAN]]), f32([[0.5, 1.0, 1.5, INF]])
    mask = jnp.asarray([[[True, True, True, False]]])
    advantages, targets = returns.gae(rewards, values, mask, gamma=0.5, lam=0.8)
    # delta_2 = 2 - 1.5 = 0.5; delta_1 = 0 + 0.5 * 1.5 - 1 = -0.25; delta_0 = 1 + 0.5 * 1 - 0.5 = 1.
    # A_2 = 0.5; A_1 = -0.25 + 0.4 * 0.5 = -0.05; A_0 = 1 + 0.4 * -0.05 = 0.98.
    close(advantages, [[[0.98, -0.05, 0.5, 0.0]]])
    close(targets, [[[1.48, 0.95, 2.0, 0.0]]])


def test_gae_steps_over_masked_slots():
    rewards, values = f32([[9.0, 1.0, 9.0, 0.0, 2.0]]), f32([[9.0, 0.5, 9.0, 1.0, 1.5]])
    advantages, _ = returns.gae(rewards, values, jnp.asarray([[[False, True, False, True, True]]]), 0.5, 0.8)
    close(advantages, [[[0.0, 0.98, 0.0, -0.05, 0.5]]])  # the numbers of the test above


@pytest.mark.parametrize("seed", range(3))
def test_gae_at_gamma_1_lam_1_is_reward_to_go_minus_value(seed):
    rewards, values = draw(seed, *SHAPE), draw(seed + 9, *SHAPE)
    advantages, targets = returns.gae(rewards, values, MASK, 1.0, 1.0)
    kept = np.where(np.asarray(MASK), np.asarray(rewards, np.float64), 0)
    to_go = np.where(np.asarray(MASK), np.cumsum(kept[..., ::-1], axis=-1)[..., ::-1], 0)
    close(targets, to_go, atol=1e-5)
    close(advantages, np.where(np.asarray(MASK), to_go - np.asarray(values), 0), atol=1e-5)


@given(st.integers(0, 2**31 - 1), st.sampled_from([(0.99, 0.95), (1.0, 0.9), (0.7, 0.0), (0.0, 0.5)]))
@settings(max_examples=15, deadline=None)
def test_gae_equals_the_papers_sum(seed, discounts):
    """Eq. 16 as it stands: the sum of (gamma lam)^l delta_{t+l}, in float64."""
    gamma, lam = discounts
    rewards, values = draw(seed, *SHAPE), draw(seed + 1, *SHAPE)
    advantages = np.asarray(returns.gae(rewards, values, MASK, gamma, lam)[0])
    wide = [np.asarray(each, np.float64) for each in (rewards, values)]
    for row, column in np.ndindex(SHAPE[:2]):
        size = int(np.asarray(MASK)[row, column].sum())
        r, v = (each[row, column, :size] for each in wide)
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < size else 0) - v[t] for t in range(size)]
        wanted = [sum((gamma * lam) ** k * deltas[t + k] for k in range(size - t)) for t in range(size)]
        close(advantages[row, column, :size], wanted, atol=1e-5)


def test_whiten_by_hand():
    values, mask = f32(1.0, 3.0, NAN, 5.0), jnp.asarray([True, True, False, True])
    # Mean 3, variance (4 + 0 + 4) / 3 = 8/3; 2 / sqrt(8/3) = 1.22474487.
    close(returns.whiten(values, mask), [-1.22474487, 0.0, 0.0, 1.22474487])
    close(returns.whiten(values, mask, shift=False), [1.77525513, 3.0, 0.0, 4.22474487])


def test_whitened_moments_and_degenerate_cases():
    out = np.asarray(returns.whiten(3 + 50 * draw(0, *SHAPE), MASK), np.float64)[np.asarray(MASK)]
    assert abs(out.mean()) < 1e-6 and abs(out.std() - 1) < 1e-5
    for equal in (0.1, 1000.1):
        values = jnp.full(SHAPE, equal, jnp.float32)
        np.testing.assert_array_equal(np.asarray(returns.whiten(values, MASK)), 0)
    np.testing.assert_array_equal(np.asarray(returns.whiten(jnp.full(SHAPE, NAN, jnp.float32), MASK & False)), 0)


def test_adaptive_kl_coefficient_by_hand():
    def after(kl, **options):
        return float(returns.adapt_kl_coefficient(jnp.float32(0.2), jnp.float32(kl), 6.0, **options))

    # (6.6 - 6) / 6 = 0.1: 0.2 * (1 + 0.1 * 0.1). Far above and below: the error is held to +-0.2.
    assert after(6.6) == pytest.approx(0.202)
    assert after(60.0) == pytest.approx(0.2 * 1.02)
    assert after(0.0) == pytest.approx(0.2 * 0.98)
    assert after(6.0) == pytest.approx(0.2)
    assert after(60.0, gain=0.0) == np.float32(0.2)  # a fixed coefficient
    assert after(60.0, gain=1.0, most=0.5) == pytest.approx(0.3)
    assert after(0.0, gain=1.0, most=0.5) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="KL target is 0"):
        returns.adapt_kl_coefficient(jnp.float32(0.2), jnp.float32(1.0), 0.0)


def test_explained_variance_by_hand():
    target, mask = f32(1.0, 2.0, 3.0, NAN), jnp.asarray([True, True, True, False])
    assert float(returns.explained_variance(target, target, mask)) == 1.0
    assert float(returns.explained_variance(target + 7, target, mask)) == pytest.approx(1.0)  # an offset is no variance
    assert float(returns.explained_variance(f32(4.0, 4.0, 4.0, INF), target, mask)) == pytest.approx(0.0)
    # Residuals 0, 0, 2: variance 8/9, of returns 2/3: 1 - 4/3.
    assert float(returns.explained_variance(f32(1.0, 2.0, 1.0, 0.0), target, mask)) == pytest.approx(-1 / 3)
    assert float(returns.explained_variance(target, jnp.full(4, 0.1, jnp.float32), mask)) == 0.0
    assert float(returns.explained_variance(target, target, mask & False)) == 0.0


def test_what_lies_under_the_mask_does_nothing():
    rubbish = jnp.resize(f32(NAN, INF, -INF, 1e38), SHAPE)
    clean = [jnp.where(MASK, draw(seed, *SHAPE), 0) for seed in range(3)]
    dirty = [jnp.where(MASK, each, rubbish) for each in clean]
    scores, finished = draw(4, 2, 3), jnp.ones((2, 3), bool)

    def chain(arrays, scores):
        rewards = returns.kl_rewards(scores, arrays[0], arrays[1], MASK, finished, 0.1, 1.0)
        advantages, targets = returns.gae(rewards, arrays[2], MASK, 0.9, 0.9)
        return returns.whiten(advantages, MASK), targets, returns.explained_variance(arrays[2], targets, MASK)

    empty = ~jnp.any(MASK, axis=2)
    assert bool(empty.any())  # a response without a token: its score goes nowhere
    for found, wanted in zip(chain(dirty, jnp.where(empty, NAN, scores)), jax.jit(chain)(clean, scores), strict=True):
        assert np.isfinite(np.asarray(found)).all()
        close(found, np.asarray(wanted))


def test_advantages_do_not_depend_on_added_slots():
    rewards, values = draw(0, *SHAPE), draw(1, *SHAPE)
    wider = [
        jnp.pad(each, ((0, 0), (0, 0), (0, 4)), constant_values=value)
        for each, value in ((rewards, math.pi), (values, NAN), (MASK, False))
    ]
    narrow, wide = returns.gae(rewards, values, MASK, 0.9, 0.9)[0], returns.gae(*wider, 0.9, 0.9)[0]
    np.testing.assert_array_equal(np.asarray(wide[:, :, : SHAPE[2]]), np.asarray(narrow))
