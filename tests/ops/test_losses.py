"""Takes the losses of `ops.losses`; gives proof by hand, by identities and by torch formulations of the papers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.ops import losses, preferences

LOG2 = math.log(2)
NAN, INF = float("nan"), float("inf")


def f32(*values):
    return jnp.asarray(values, jnp.float32)


def mean(pair):
    return float(pair[0]) / float(pair[1])


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=atol)


def test_sft_by_hand():
    logps = f32([-1.0, -2.0, NAN], [-0.5, INF, -INF])
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    total, weight, metrics = losses.sft(logps, mask)
    # 1 + 2 + 0.5 over 3 tokens, in 2 rows.
    close([total, weight], [3.5, 3.0])
    close(metrics["response_len"], [3.0, 2.0])


def test_reward_by_hand():
    scores = f32([2.0, 0.5], [0.25, 1.0], [0.75, 0.75])
    weight = f32(1.0, 1.0, 1.0)
    total, weight_sum, metrics = losses.reward(scores, weight)
    # Gaps 1.5, -0.75, 0. -log sigmoid(g) = log(1 + e^-g):
    # e^-1.5 = 0.22313016, log 1.22313016 = 0.20141328; e^0.75 = 2.11700002, log 3.11700002 = 1.13687100; log 2.
    close([total, weight_sum], [0.20141328 + 1.13687100 + LOG2, 3.0])
    close(metrics["accuracy"], [1.5, 3.0])  # right, wrong, a tie's half
    close(metrics["gap"], [0.75, 3.0])
    close(metrics["score_chosen"], [3.0, 3.0])
    close(metrics["score_rejected"], [2.25, 3.0])
    # A margin asked of the gap: 1.5 - 1.5 = 0, -0.75 + 0.75 = 0; the label's accuracy is what it was.
    total, _, metrics = losses.reward(scores, weight, f32(1.5, -0.75, 0.0))
    close(total, 3 * LOG2)
    close(metrics["accuracy"], [1.5, 3.0])


def test_reward_gradient_by_hand():
    # d/dg of -log sigmoid(g - m) is -sigmoid(m - g); at g = 1, m = 1 it is -1/2, on chosen, and +1/2 on rejected.
    grad = jax.grad(lambda s: losses.reward(s, f32(2.0), f32(1.0))[0])(f32([1.0, 0.0]))
    close(grad, [[-1.0, 1.0]])


def test_scores_in_an_integer_buffer_are_refused():
    with pytest.raises(ValueError, match=r"scores is int32\[2, 2\]; expected dtype float32"):
        losses.reward(jnp.ones((2, 2), jnp.int32), f32(1.0, 1.0))


# Log-ratios 2, 1, -1 (chosen) and -1, 3, -1 (rejected); their differences are 3, -2, 0.
PAIRS = (f32(-8.0, -5.0, -4.0), f32(-7.0, -6.0, -9.0), f32(-10.0, -6.0, -3.0), f32(-6.0, -9.0, -8.0))
ONES = f32(1.0, 1.0, 1.0)


def test_dpo_by_hand():
    total, weight, metrics = preferences.dpo(*PAIRS, ONES, beta=0.5)
    # Logits 1.5, -1, 0: log(1 + e^-1.5) = 0.20141328, log(1 + e^1) = 1.31326169, log 2.
    close([total, weight], [0.20141328 + 1.31326169 + LOG2, 3.0])
    wanted = {
        "chosen_reward": 0.5 * (2 + 1 - 1),
        "rejected_reward": 0.5 * (-1 + 3 - 1),
        "reward_margin": 0.5 * (3 - 2 + 0),
        "accuracy": 1 + 0 + 0.5,
        "chosen_logps": -17.0,
        "rejected_logps": -22.0,
        "kl_chosen": 2.0,
        "kl_rejected": 1.0,
    }
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        close(metrics[name], [value, 3.0])


def test_conservative_dpo_by_hand():
    total, _, _ = preferences.dpo(*PAIRS, ONES, beta=0.5, label_smoothing=0.1)
    # 0.9 log(1 + e^-z) + 0.1 log(1 + e^z), and log(1 + e^z) = z + log(1 + e^-z):
    # 0.20141328 + 0.1 * 1.5; 1.31326169 - 0.1 * 1; log 2 + 0.
    close(total, 0.35141328 + 1.21326169 + LOG2)


def test_ipo_by_hand():
    # 1 / (2 * 0.25) = 2: (3 - 2)^2 + (-2 - 2)^2 + (0 - 2)^2 = 1 + 16 + 4.
    total, weight, metrics = preferences.ipo(*PAIRS, ONES, beta=0.25)
    close([total, weight], [21.0, 3.0])
    close(metrics["chosen_reward"], [0.25 * 2, 3.0])


def test_chosen_nll_joins_dpo():
    pairs, weight = preferences.dpo(*PAIRS, ONES, beta=0.5), ONES
    nll = losses.chosen_nll(PAIRS[0], jnp.asarray([4, 2, 8], jnp.int32), weight)
    # 8/4 + 5/2 + 4/8 = 5.
    close(nll[0], 5.0)
    total, weight_sum, metrics = losses.add(pairs, (0.2, nll))
    close([total, weight_sum], [float(pairs[0]) + 1.0, 3.0])
    assert {"chosen_nll", "reward_margin"} <= metrics.keys()
    with pytest.raises(ValueError, match="chosen_nll"):
        losses.add(nll, (1.0, nll))


def test_an_empty_chosen_response_divides_by_nothing():
    total, _, _ = losses.chosen_nll(f32(0.0), jnp.asarray([0], jnp.int32), f32(1.0))
    assert float(total) == 0.0


@given(
    st.lists(st.tuples(*[st.floats(-300, 0, width=32)] * 2), min_size=8, max_size=8),
    st.sampled_from([0.01, 0.1, 2.0]),
)
@settings(max_examples=20, deadline=None)
def test_dpo_at_the_reference_is_log_2(pairs, beta):
    chosen, rejected = (jnp.asarray(side, jnp.float32) for side in zip(*pairs, strict=True))
    for smoothing in (0.0, 0.3):
        total, weight, metrics = preferences.dpo(
            chosen, rejected, chosen, rejected, jnp.ones(8, jnp.float32), beta, smoothing
        )
        close(float(total) / float(weight), LOG2)
        assert mean(metrics["accuracy"]) == 0.5
        assert mean(metrics["reward_margin"]) == mean(metrics["kl_chosen"]) == 0.0


LOSSES = {
    "reward": lambda a, b, c, d, w: losses.reward(jnp.stack([a, b], axis=1), w, c - d),
    "dpo": lambda a, b, c, d, w: preferences.dpo(a, b, c, d, w, 0.3),
    "cdpo": lambda a, b, c, d, w: preferences.dpo(a, b, c, d, w, 0.3, 0.2),
    "ipo": lambda a, b, c, d, w: preferences.ipo(a, b, c, d, w, 0.3),
    "nll": lambda a, b, c, d, w: losses.chosen_nll(a, jnp.full(a.shape, 7, jnp.int32), w),
    "sft": lambda a, b, c, d, w: losses.sft(jnp.stack([a, b], axis=1), jnp.stack([w > 0, w > 0], axis=1)),
}


def _vectors(seed, rows):
    drawn = np.random.default_rng(seed).normal(0, 4, (4, rows)).astype(np.float32)
    return [jnp.asarray(each) for each in drawn]


@functools.cache
def _compiled(name):
    """`(arrays, weight) -> ((sum, [weight, metrics]), gradients)`."""

    def loss(arrays, weight):
        total, *rest = LOSSES[name](*arrays, weight)
        return total, rest

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_weight_0_contribute_nothing(name):
    weight = f32(1, 1, 1, 1, 0, 0, 0, 0)
    clean = [jnp.where(weight > 0, each, 0) for each in _vectors(0, 8)]
    dirty = [each.at[4:].set(f32(NAN, INF, -INF, 1e38)) for each in clean]
    wanted, wanted_grads = _compiled(name)(clean, weight)
    found, grads = _compiled(name)(dirty, weight)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, wanted)
    for grad, want in zip(grads, wanted_grads, strict=True):
        np.testing.assert_array_equal(np.asarray(grad), np.asarray(want))
        np.testing.assert_array_equal(np.asarray(grad[4:]), 0)
    # And the zeros in their place are nothing too: the four real rows alone give the same.
    alone, _ = _compiled(name)([each[:4] for each in clean], weight[:4])
    jax.tree.map(close, found, alone)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_filler_has_weight_0_and_gradient_0(name):
    out = _compiled(name)([jnp.full(8, NAN, jnp.float32)] * 4, jnp.zeros(8, jnp.float32))
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(np.asarray(leaf), 0)


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_add_up_to_the_full_batch(name):
    arrays, weight = _vectors(1, 8), f32(1, 0, 1, 1, 0, 0, 1, 1)
    whole, _ = _compiled(name)(arrays, weight)
    parts = [_compiled(name)([each[rows] for each in arrays], weight[rows])[0] for rows in (slice(0, 4), slice(4, 8))]
    jax.tree.map(lambda all_, *some: close(sum(some), all_, atol=1e-4), whole, *parts)


def _torch_preference(torch, name, policy, reference, beta, smoothing):
    """Written from the papers' formulas, by way of likelihoods' ratios; returns a sum over pairs."""
    delta = (policy[0] - policy[1]) - (reference[0] - reference[1])
    if name == "ipo":
        return ((delta - 0.5 / beta) ** 2).sum()
    prefers = 1 / (1 + torch.exp(-beta * delta))  # p(chosen beats rejected), eq. 6 of Rafailov et al.
    return -((1 - smoothing) * torch.log(prefers) + smoothing * torch.log(1 - prefers)).sum()


@pytest.mark.parametrize(("name", "beta", "smoothing"), [("dpo", 0.1, 0.0), ("dpo", 0.5, 0.2), ("ipo", 0.1, 0.0)])
def test_preference_losses_and_gradients_equal_torch(torch, name, beta, smoothing):
    arrays = _vectors(2, 8)

    def ours(arrays):
        if name == "ipo":
            return preferences.ipo(*arrays, jnp.ones(8, jnp.float32), beta)[0]
        return preferences.dpo(*arrays, jnp.ones(8, jnp.float32), beta, smoothing)[0]

    found, grads = jax.value_and_grad(ours)(arrays)
    theirs = [torch.tensor(np.asarray(each), dtype=torch.float64, requires_grad=True) for each in arrays]
    wanted = _torch_preference(torch, name, theirs[:2], theirs[2:], beta, smoothing)
    wanted.backward()
    np.testing.assert_allclose(float(found), wanted.item(), rtol=1e-5)
    for grad, their in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(grad), their.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_reward_loss_and_gradient_equal_torch(torch):
    chosen, rejected, margin, _ = _vectors(3, 8)
    scores = jnp.stack([chosen, rejected], axis=1)
    found, grad = jax.value_and_grad(lambda s: losses.reward(s, jnp.ones(8, jnp.float32), margin)[0])(scores)
    theirs = torch.tensor(np.asarray(scores), dtype=torch.float64, requires_grad=True)
    gap = theirs[:, 0] - theirs[:, 1] - torch.tensor(np.asarray(margin))
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(gap, torch.ones_like(gap), reduction="sum")
    wanted.backward()
    np.testing.assert_allclose(float(found), wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(grad), theirs.grad.numpy(), atol=1e-5)


def test_extreme_margins_stay_finite():
    far = f32(5000.0, -5000.0)
    for name in ("reward", "dpo", "cdpo", "ipo"):
        out, grad = jax.value_and_grad(lambda a, name=name: LOSSES[name](a, -a, -a, a, f32(1.0, 1.0))[0])(far)
        assert np.isfinite(float(out)) and np.isfinite(np.asarray(grad)).all(), name


def test_bad_settings_and_shapes_are_named():
    with pytest.raises(ValueError, match="beta is 0"):
        preferences.dpo(*PAIRS, ONES, beta=0)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5"):
        preferences.dpo(*PAIRS, ONES, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"reference_rejected is float32\[2\]; expected \[B\] with B = 3"):
        preferences.dpo(*PAIRS[:3], f32(1.0, 2.0), ONES, beta=0.1)
    with pytest.raises(ValueError, match=r"scores is float32\[2, 3\]; expected \[B,2\]"):
        losses.reward(jnp.ones((2, 3), jnp.float32), f32(1.0, 1.0))
    with pytest.raises(ValueError, match="mask is float32"):
        losses.sft(f32([1.0]), f32([1.0]))
