"""Takes the losses of PPO and RLOO; gives proof by hand, by identities and by a torch formulation of the papers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.ops import losses, policy

NAN, INF = float("nan"), float("inf")
SHAPE = (4, 2, 5)


def f32(*values):
    return jnp.asarray(values, jnp.float32)


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=atol)


def draw(seed, *shape, spread=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32))


def some(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.6)


def test_ppo_by_hand():
    # Ratios 1.5, 1.5, 0.5, 0.5, 1.1, and one that the mask hides; clip 0.2.
    ratios, gains = (1.5, 1.5, 0.5, 0.5, 1.1), (2.0, -2.0, 2.0, -2.0, 1.0)
    logps = f32(*(math.log(r) - 1 for r in ratios), NAN)
    mask = jnp.asarray([True] * 5 + [False])
    total, weight, metrics = policy.ppo(logps, jnp.full(6, -1.0, jnp.float32), f32(*gains, NAN), mask, 0.2)
    # min(rA, clip(r)A): min(3, 2.4) = 2.4; min(-3, -2.4) = -3; min(1, 1.6) = 1; min(-1, -1.6) = -1.6; 1.1. Sum -0.1.
    close([total, weight], [0.1, 5.0])
    close(metrics["ratio"], [5.1, 5.0])
    close(metrics["ratio_deviation"], [0.5 * 4 + 0.1, 5.0])
    close(metrics["clip_fraction"], [4.0, 5.0])
    # k1 = -sum log r = -(2 * 0.40546511 - 2 * 0.69314718 + 0.09531018) = 0.48005396.
    close(metrics["approx_kl"], [0.48005396, 5.0])
    # k3 = sum (r - 1) - log r = 0.1 + 0.48005396.
    close(metrics["approx_kl_k3"], [0.58005396, 5.0])


def test_ppo_gradient_by_hand():
    # d/dlogp of -rA is -rA where the surrogate isn't clipped; 0 where r > 1.2 with A > 0 or r < 0.8 with A < 0.
    ratios, gains = np.asarray([1.5, 1.5, 0.5, 0.5, 1.1]), np.asarray([2.0, -2.0, 2.0, -2.0, 1.0])
    grad = jax.grad(lambda logps: policy.ppo(logps, jnp.zeros(5, jnp.float32), f32(*gains), jnp.ones(5, bool), 0.2)[0])(
        f32(*np.log(ratios))
    )
    close(grad, [0.0, 3.0, -1.0, 0.0, -1.1])


@pytest.mark.parametrize("seed", range(3))
def test_ppo_before_the_first_update(seed):
    """Ratio 1 and KL 0; the loss is minus the sum of advantages, its gradient that of the plain policy gradient."""
    logps, gains, mask = draw(seed, *SHAPE, spread=5), draw(seed + 1, *SHAPE), some(seed, *SHAPE)

    def loss(new):
        total, *rest = policy.ppo(new, logps, gains, mask, 0.2)
        return total, rest

    (total, (weight, metrics)), grad = jax.value_and_grad(loss, has_aux=True)(logps)
    kept = np.where(np.asarray(mask), np.asarray(gains), 0)
    close(total, -kept.sum(), atol=1e-5)
    close(grad, -kept)
    close(metrics["ratio"], [weight, weight])
    for name in ("approx_kl", "approx_kl_k3", "clip_fraction", "ratio_deviation"):
        assert float(metrics[name][0]) == 0
    for estimate, _ in policy.kl_metrics(logps, logps, mask).values():
        assert float(estimate) == 0


@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_ppo_loss_and_gradients_equal_torch(torch, spread):
    """Policy, value, entropy and k2 terms together, against a loop over tokens written from the paper's eq. 7 and 9."""
    shape = SHAPE
    old, ref, gains, old_values, returns = (draw(seed, *shape) for seed in range(5))
    logps, values = old + draw(5, *shape, spread=spread), old_values + draw(6, *shape, spread=spread)
    entropy, mask = jnp.abs(draw(7, *shape)), some(8, *shape)
    clip, value_clip, value_coef, entropy_coef, kl_coef = 0.2, 0.1, 0.5, 0.01, 0.05

    def ours(logps, values, entropy):
        total, weight, _ = losses.add(
            policy.ppo(logps, old, gains, mask, clip),
            (value_coef, policy.value(values, old_values, returns, mask, value_clip)),
            (entropy_coef, policy.entropy_bonus(entropy, mask)),
            (kl_coef, policy.kl_k2(logps, ref, mask)),
        )
        return total / weight

    found, grads = jax.value_and_grad(ours, argnums=(0, 1, 2))(logps, values, entropy)

    def to_torch(array, grad=False):
        return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=grad)

    t_logps, t_values, t_entropy = (to_torch(each, True) for each in (logps, values, entropy))
    t_old, t_ref, t_gains, t_old_values, t_returns = map(to_torch, (old, ref, gains, old_values, returns))
    terms = []
    for at in zip(*np.nonzero(np.asarray(mask)), strict=True):
        ratio = torch.exp(t_logps[at]) / torch.exp(t_old[at])
        unclipped, limited = ratio * t_gains[at], torch.clamp(ratio, 1 - clip, 1 + clip) * t_gains[at]
        surrogate = unclipped if unclipped < limited else limited
        near = torch.clamp(t_values[at], t_old_values[at] - value_clip, t_old_values[at] + value_clip)
        errors = [(t_values[at] - t_returns[at]) ** 2, (near - t_returns[at]) ** 2]
        squared = errors[0] if errors[0] >= errors[1] else errors[1]
        k2 = (t_logps[at] - t_ref[at]) ** 2 / 2
        terms.append(-surrogate + value_coef * squared / 2 - entropy_coef * t_entropy[at] + kl_coef * k2)
    wanted = torch.stack(terms).mean()
    wanted.backward()
    np.testing.assert_allclose(float(found), wanted.item(), rtol=1e-5)
    for grad, their in zip(grads, (t_logps, t_values, t_entropy), strict=True):
        np.testing.assert_allclose(np.asarray(grad), their.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_value_by_hand():
    values, old, returns = f32(1.0, 2.0, 0.5, NAN), f32(0.0, 2.0, 0.0, 0.0), f32(2.0, 1.0, 0.0, INF)
    mask = jnp.asarray([True, True, True, False])
    total, weight, metrics = policy.value(values, old, returns, mask)
    # Half of 1 + 1 + 0.25.
    close([total, weight], [1.125, 3.0])
    close(metrics["value_clip_fraction"], [0.0, 3.0])
    close(metrics["value"], [3.5, 3.0])
    close(metrics["return"], [3.0, 3.0])
    # Held within 0.2 of the old values: 0.2, 2.0, 0.2; errors 1.8^2 = 3.24 (the larger), 1, 0.04 (the smaller).
    total, _, metrics = policy.value(values, old, returns, mask, clip=0.2)
    close(total, 0.5 * (3.24 + 1 + 0.25))
    close(metrics["value_clip_fraction"], [1.0, 3.0])
    grad = jax.grad(lambda v: policy.value(v, old, returns, mask, clip=0.2)[0])(values)
    # Nothing flows where the clipped error rules; elsewhere value - return.
    close(grad, [0.0, 1.0, 0.5, 0.0])


def test_entropy_bonus_by_hand():
    total, weight, metrics = policy.entropy_bonus(f32(0.5, 0.25, NAN), jnp.asarray([True, True, False]))
    close([total, weight], [-0.75, 2.0])
    close(metrics["entropy"], [0.75, 2.0])


def test_kl_estimates_by_hand():
    # Log-ratios 1 and -0.5 in one response, 0.5 in another, none in the third.
    logps, mask = f32([[0.0, -1.5], [-0.5, NAN], [NAN, NAN]]), jnp.asarray([[[1, 1], [1, 0], [0, 0]]], bool)
    ref = f32([[-1.0, -1.0], [-1.0, 3.0], [0.0, 0.0]])
    out = policy.kl_metrics(logps, ref, mask)
    # k3: e^-1 - 1 + 1 = 0.36787944; e^0.5 - 1 - 0.5 = 0.14872127; e^-0.5 - 1 + 0.5 = 0.10653066.
    close(out["kl"], [1.0, 2.0])
    close(out["kl_token"], [1.0, 3.0])
    close(out["kl_k3"], [0.62313137, 2.0])
    close(out["kl_token_k3"], [0.62313137, 3.0])
    # k2: (1 + 0.25 + 0.25) / 2; its gradient is the log-ratio.
    (total, weight, metrics), grad = (
        policy.kl_k2(logps, ref, mask),
        jax.grad(lambda x: policy.kl_k2(x, ref, mask)[0])(logps),
    )
    close([total, weight], [0.75, 3.0])
    close(metrics["kl_k2"], [0.75, 3.0])
    close(grad, [[[1.0, -0.5], [0.5, 0.0], [0.0, 0.0]]])


def test_k2_has_the_gradient_of_the_kl():
    """Over a three-token policy's own distribution, the expected gradient of k2 is that of KL(policy || reference)."""
    logits, reference = f32(0.3, -0.7, 1.1), jax.nn.log_softmax(f32(1.0, 0.2, -0.4))

    def kl(logits):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logps) * (logps - reference))

    def expected(logits):
        logps = jax.nn.log_softmax(logits)
        probabilities = jax.lax.stop_gradient(jnp.exp(logps))
        each = [policy.kl_k2(logps[i], reference[i], jnp.asarray(True))[0] for i in range(3)]
        return jnp.sum(probabilities * jnp.stack(each))

    close(jax.grad(expected)(logits), np.asarray(jax.grad(kl)(logits)))


def test_leave_one_out_by_hand():
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2; the second prompt's scores are fractional; the third is filler.
    scores = f32([1.0, 2.0, 6.0], [0.7, 0.1, 0.1], [NAN, INF, 1.0])
    close(policy.leave_one_out(scores, f32(1.0, 1.0, 0.0)), [[-3.0, -1.5, 4.5], [0.6, -0.3, -0.3], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="found 1"):
        policy.leave_one_out(f32([1.0]), f32(1.0))


@given(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_leave_one_out_sums_to_0_and_ignores_a_shift(scores):
    row = f32(scores)
    out = np.asarray(policy.leave_one_out(row, f32(1.0)))
    assert abs(out.sum()) < 1e-3
    np.testing.assert_allclose(policy.leave_one_out(row + 5, f32(1.0)), out, atol=1e-3)
    wide = np.asarray(scores, np.float64)
    np.testing.assert_allclose(out[0], wide - (wide.sum() - wide) / (len(wide) - 1), atol=1e-3)


def test_reinforce_by_hand():
    logps = f32([[-1.0, -2.0], [-0.5, NAN]], [[-3.0, -4.0], [NAN, NAN]])
    mask = jnp.asarray([[[1, 1], [1, 0]], [[1, 1], [0, 0]]], bool)
    gains = f32([2.0, -1.0], [0.5, NAN])
    # -(2 * -3 - 1 * -0.5 + 0.5 * -7) = 6 - 0.5 + 3.5 = 9, over 3 responses.
    total, weight, metrics = policy.reinforce(logps, gains, mask)
    close([total, weight], [9.0, 3.0])
    close(metrics["advantage"], [1.5, 3.0])
    close(metrics["seq_logps"], [-10.5, 3.0])
    grad = jax.grad(lambda x: policy.reinforce(x, gains, mask)[0])(logps)
    close(grad, [[[-2.0, -2.0], [1.0, 0.0]], [[-0.5, -0.5], [0.0, 0.0]]])


ALL = {
    "ppo": lambda a, b, c, mask: policy.ppo(a, b, c, mask, 0.2),
    "value": lambda a, b, c, mask: policy.value(a, b, c, mask),
    "value_clipped": lambda a, b, c, mask: policy.value(a, b, c, mask, 0.2),
    "entropy": lambda a, b, c, mask: policy.entropy_bonus(a, mask),
    "k2": lambda a, b, c, mask: policy.kl_k2(a, b, mask),
    "reinforce": lambda a, b, c, mask: policy.reinforce(a, b[:, :, 0], mask),
}


@functools.cache
def _compiled(name):
    """`(arrays, mask) -> ((sum, [weight, metrics]), gradients of all arrays)`."""

    def loss(arrays, mask):
        total, *rest = ALL[name](*arrays, mask)
        return total, rest

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", ALL)
def test_what_lies_under_the_mask_does_nothing(name):
    mask = some(3, *SHAPE).at[:, :, 0].set(True).at[3].set(False)
    rubbish = jnp.resize(f32(NAN, INF, -INF, 1e38), SHAPE)
    clean = [jnp.where(mask, draw(seed, *SHAPE), 0) for seed in range(3)]
    dirty = [jnp.where(mask, each, rubbish) for each in clean]
    wanted, found = _compiled(name)(clean, mask), _compiled(name)(dirty, mask)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, wanted)
    for grad in found[1]:
        np.testing.assert_array_equal(np.asarray(grad)[~np.asarray(mask)], 0)


@pytest.mark.parametrize("name", ALL)
def test_an_all_masked_batch_has_weight_0_and_gradient_0(name):
    out = _compiled(name)([jnp.full(SHAPE, NAN, jnp.float32)] * 3, jnp.zeros(SHAPE, bool))
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(np.asarray(leaf), 0)


@pytest.mark.parametrize("name", ALL)
def test_microbatches_add_up_to_the_full_batch(name):
    arrays, mask = [draw(seed, *SHAPE) for seed in range(3)], some(9, *SHAPE)
    whole, _ = _compiled(name)(arrays, mask)
    parts = [_compiled(name)([each[rows] for each in arrays], mask[rows])[0] for rows in (slice(0, 2), slice(2, 4))]
    jax.tree.map(lambda all_, *few: close(sum(few), all_, atol=1e-4), whole, *parts)


@pytest.mark.parametrize("name", ["ppo", "value_clipped", "k2", "reinforce"])
def test_nothing_flows_into_what_the_rollout_fixed(name):
    _, grads = _compiled(name)([draw(seed, *SHAPE) for seed in range(3)], jnp.ones(SHAPE, bool))
    assert np.abs(np.asarray(grads[0])).max() > 0
    for grad in grads[1:]:
        np.testing.assert_array_equal(np.asarray(grad), 0)


def test_bad_settings_and_shapes_are_named():
    x, mask = draw(0, 2, 3), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="ratio clip is 0"):
        policy.ppo(x, x, x, mask, 0.0)
    with pytest.raises(ValueError, match="value clip is 0"):
        policy.value(x, x, x, mask, clip=0.0)
    with pytest.raises(ValueError, match=r"advantages is float32\[2\]; expected the shape of the others, \[2, 3\]"):
        policy.ppo(x, x, x[:, 0], mask, 0.2)
