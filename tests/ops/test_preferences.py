"""Every objective of `ops.preferences`, its value and its gradients: against TRL's trainers, or against its paper's
formula in torch where TRL has none; numbers by hand for what is particular to each."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.ops import preferences
from mpo_jax.ops.preferences import OBJECTIVES
from tests.ops import trl_losses

ROWS = 16
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", autouse=True)
def _trl():
    pytest.importorskip("trl", reason="trl is not installed")


def drawn(seed: int, size: float = 3.0):
    """Four summed log-probs f32 [ROWS], below 0, the reference's near the policy's; and lengths of both replies."""
    random = np.random.default_rng(seed)
    policy = -random.uniform(1, 30, (2, ROWS))
    reference = np.minimum(policy + random.normal(0, size, (2, ROWS)), -0.1)
    lens = random.integers(1, 12, (2, ROWS)).astype(np.int32)
    return [jnp.asarray(each, jnp.float32) for each in (*policy, *reference)], [jnp.asarray(each) for each in lens]


def ours(name: str, arrays, lens, beta: float, **settings):
    """Mean and gradients by the four log-probs of an objective, called as its line in the table says."""
    objective = OBJECTIVES[name]

    def mean(arrays):
        given = dict(zip(("policy_chosen", "policy_rejected"), arrays[:2], strict=True))
        if objective.reference:
            given |= dict(zip(("reference_chosen", "reference_rejected"), arrays[2:], strict=True))
        if objective.lengths:
            given |= {"chosen_len": lens[0], "rejected_len": lens[1]}
        total, weight, _ = objective.loss(**given, weight=jnp.ones(ROWS, jnp.float32), beta=beta, **settings)
        return total / weight

    value, grads = jax.value_and_grad(mean)(arrays)
    return float(value), [np.asarray(grad) for grad in grads]


def ratios(torch, arrays):
    """Leaves in float64, and the log-ratios of chosen and rejected."""
    leaves = [torch.tensor(np.asarray(each), dtype=torch.float64, requires_grad=True) for each in arrays]
    return leaves, leaves[0] - leaves[2], leaves[1] - leaves[3]


def theirs(torch, name: str, arrays, lens, beta: float, **settings):
    """Value and gradients by TRL; by the formula of Pal et al. 2024, eq. 3, of the one objective that TRL lacks."""
    smoothing = settings.get("label_smoothing", 0.0)
    known = {"hinge": "hinge", "robust": "robust", "dpo_norm": "sigmoid_norm"}
    if name == "dpo" and not smoothing:
        return trl_losses.dpo(torch, "sigmoid", arrays, lens, beta)
    if name == "dpo":  # TRL has its conservative form in CPO: of log-ratios in place of log-probs
        pair = arrays[0] - arrays[2], arrays[1] - arrays[3]
        value, (chosen, rejected) = trl_losses.cpo(torch, "sigmoid", *pair, beta, label_smoothing=smoothing)
        return value, [chosen, rejected, -chosen, -rejected]
    if name == "ipo":  # TRL averages over tokens: of replies of one token that is the paper's sum
        return trl_losses.dpo(torch, "ipo", arrays, [np.ones(ROWS, int)] * 2, beta)
    if name in known:
        return trl_losses.dpo(torch, known[name], arrays, [np.asarray(each) for each in lens], beta, smoothing)
    if name in ("simpo", "orpo"):
        counts = [np.asarray(each, np.float32) for each in lens]
        means = [np.asarray(each) / count for each, count in zip(arrays, counts, strict=False)]
        if name == "simpo":
            value, grads = trl_losses.cpo(torch, "simpo", *means, beta, settings["gamma"])
        else:  # TRL subtracts it from the likelihood's term, which its trainer takes over a batch's tokens
            value, grads = trl_losses.orpo(torch, *means, beta)
            value = -means[0].astype(np.float64).mean() - value
            grads = [-1 / ROWS - grads[0], -grads[1]]
        return value, [*(g / count for g, count in zip(grads, counts, strict=True)), np.zeros(ROWS), np.zeros(ROWS)]
    assert name == "dpop", f"{name}: nothing to compare it with"
    leaves, chosen, rejected = ratios(torch, arrays)
    penalty = settings["chosen_penalty"] * torch.clamp(leaves[2] - leaves[0], min=0)
    loss = -torch.log(torch.sigmoid(beta * (chosen - rejected - penalty))).mean()
    return trl_losses._backward(loss, leaves)


CASES = {
    "dpo": ("dpo", 0.1, {}),
    "dpo, conservative": ("dpo", 0.3, {"label_smoothing": 0.2}),
    "ipo": ("ipo", 0.5, {}),
    "robust": ("robust", 0.3, {"label_smoothing": 0.2}),
    "hinge": ("hinge", 0.4, {}),
    "dpo_norm": ("dpo_norm", 5.0, {}),
    "dpop": ("dpop", 0.3, {"chosen_penalty": 5.0}),
    "simpo": ("simpo", 2.0, {"gamma": 0.8}),
    "orpo": ("orpo", 0.5, {}),
}


def test_every_objective_is_compared():
    assert {name for name, _, _ in CASES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_those_of_trl_or_of_the_paper(torch, case):
    name, beta, settings = CASES[case]
    far = {"value": 0.0, "gradient": 0.0}
    for seed in range(4):
        arrays, lens = drawn(seed)
        value, grads = ours(name, arrays, lens, beta, **settings)
        wanted, their_grads = theirs(torch, name, arrays, lens, beta, **settings)
        far["value"] = max(far["value"], abs(value - wanted) / max(1, abs(wanted)))
        for grad, their in zip(grads, their_grads, strict=True):
            if not OBJECTIVES[name].reference and not grad.any():
                assert not their.any()
            far["gradient"] = max(far["gradient"], np.abs(grad - their).max())
    print(f"{case}: value {far['value']:.1e}, gradient {far['gradient']:.1e}")
    assert far["value"] < 1e-6 and far["gradient"] < 1e-6


def test_kto_value_and_gradients_equal_those_of_trl(torch):
    far = 0.0
    for seed in range(4):
        (policy, other, reference, other_reference), _ = drawn(seed)
        other = other + 2.0  # so that the reference point is above 0 where it is drawn so
        desirable = jnp.asarray(np.random.default_rng(seed).uniform(size=ROWS) < 0.4)
        ones = jnp.ones(ROWS, jnp.float32)

        def mean(policy, reference, other=other, other_reference=other_reference, desirable=desirable, ones=ones):
            zero = preferences.kto_zero(other, other_reference, ones)
            total, weight, _ = preferences.kto(policy, reference, desirable, ones, 0.2, zero, 1.3, 0.7)
            return total / weight

        value, grads = jax.value_and_grad(mean, argnums=(0, 1))(policy, reference)
        wanted, their = trl_losses.kto(torch, policy, reference, other, other_reference, desirable, 0.2, (1.3, 0.7))
        far = max(far, abs(float(value) - wanted), *(np.abs(a - b).max() for a, b in zip(grads, their, strict=True)))
    print(f"kto: value and gradient {far:.1e}")
    assert far < 1e-6


# By hand --------------------------------------------------------------------------------------------------------------

# Log-ratios 2, 1, -1 (chosen) and -1, 3, -1 (rejected); their differences are 3, -2, 0.
PAIRS = [
    jnp.asarray(each, jnp.float32)
    for each in ((-8.0, -5.0, -4.0), (-7.0, -6.0, -9.0), (-10.0, -6.0, -3.0), (-6.0, -9.0, -8.0))
]
ONES = jnp.ones(3, jnp.float32)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def total(loss) -> float:
    return float(loss[0])


def test_hinge_by_hand():
    # 1 - 0.5 * (3, -2, 0) = -0.5, 2, 1.
    assert total(preferences.hinge(*PAIRS, ONES, 0.5)) == pytest.approx(0 + 2 + 1)


def test_robust_by_hand_and_its_reduction():
    # s = 0.2: (0.8 f(z) - 0.2 f(-z)) / 0.6 of z = 1.5, -1, 0 with f(z) = log(1 + e^-z).
    wanted = sum((0.8 * softplus(-z) - 0.2 * softplus(z)) / 0.6 for z in (1.5, -1.0, 0.0))
    assert total(preferences.robust(*PAIRS, ONES, 0.5, 0.2)) == pytest.approx(wanted, rel=1e-6)
    assert total(preferences.robust(*PAIRS, ONES, 0.5)) == pytest.approx(total(preferences.dpo(*PAIRS, ONES, 0.5)))


def test_robust_loss_is_the_clean_loss_in_the_mean_over_flips():
    chosen, rejected = PAIRS[::2], PAIRS[1::2]
    flipped = [chosen[0], rejected[0], chosen[1], rejected[1]], [rejected[0], chosen[0], rejected[1], chosen[1]]
    kept, turned = (total(preferences.robust(*arrays, ONES, 0.5, 0.2)) for arrays in flipped)
    assert 0.8 * kept + 0.2 * turned == pytest.approx(total(preferences.dpo(*PAIRS, ONES, 0.5)), rel=1e-5)


def test_length_normalised_dpo_by_hand():
    lens = jnp.asarray([4, 2, 1], jnp.int32), jnp.asarray([2, 3, 1], jnp.int32)
    loss = preferences.dpo_norm(*PAIRS, *lens, ONES, 2.0)
    # Per token 0.5, 0.5, -1 and -0.5, 1, -1: differences 1, -0.5, 0, twice of which are 2, -1, 0.
    assert total(loss) == pytest.approx(softplus(-2) + softplus(1) + math.log(2), rel=1e-6)
    assert float(loss[2]["reward_margin"][0]) == pytest.approx(1.0)
    assert float(loss[2]["kl_chosen"][0]) == pytest.approx(2.0)  # sums, in nats


def test_dpo_positive_by_hand():
    loss = preferences.dpop(*PAIRS, ONES, 0.5, 4.0)
    # Chosen's log-ratio is below 0 in the third pair alone, by 1: 0 - 4 * 1 = -4, times 0.5.
    assert total(loss) == pytest.approx(softplus(-1.5) + softplus(1) + softplus(2), rel=1e-6)
    same = preferences.dpop(*PAIRS, ONES, 0.5, 0.0)
    assert total(same) == pytest.approx(total(preferences.dpo(*PAIRS, ONES, 0.5)))


def test_simpo_by_hand():
    lens = jnp.asarray([4, 5, 2], jnp.int32), jnp.asarray([7, 2, 3], jnp.int32)
    loss = preferences.simpo(*PAIRS[:2], *lens, ONES, 2.0, 0.5)
    # Means -2, -1, -2 and -1, -3, -3: differences -1, 2, 1; 2 x - 0.5 = -2.5, 3.5, 1.5.
    assert total(loss) == pytest.approx(softplus(2.5) + softplus(-3.5) + softplus(-1.5), rel=1e-6)
    assert float(loss[2]["accuracy"][0]) == 2.0 and "kl_chosen" not in loss[2]


def test_orpo_by_hand():
    halves = jnp.full(3, 2 * math.log(0.5), jnp.float32), jnp.full(3, 3 * math.log(0.2), jnp.float32)
    lens = jnp.full(3, 2, jnp.int32), jnp.full(3, 3, jnp.int32)
    loss = preferences.orpo(*halves, *lens, ONES, 0.25)
    # Odds 0.5 / 0.5 = 1 and 0.2 / 0.8 = 0.25: their ratio 4, sigmoid(log 4) = 4 / 5; nll log 2.
    assert total(loss) == pytest.approx(3 * (math.log(2) + 0.25 * math.log(1.25)), rel=1e-6)
    assert float(loss[2]["log_odds_ratio"][0]) == pytest.approx(3 * math.log(4), rel=1e-5)


def test_orpo_of_replies_that_are_certain_or_hardly_possible_is_finite():
    policy = jnp.asarray([0.0, -1e-9, -5000.0], jnp.float32)
    lens = jnp.ones(3, jnp.int32)
    loss, grads = jax.value_and_grad(lambda a: preferences.orpo(a, a[::-1], lens, lens, ONES, 0.5)[0])(policy)
    assert np.isfinite(float(loss)) and np.isfinite(np.asarray(grads)).all()


def test_kto_by_hand():
    policy, reference = jnp.asarray([1.0, 3.0, 9.0], jnp.float32), jnp.zeros(3, jnp.float32)
    desirable, weight = jnp.asarray([True, False, True]), jnp.asarray([1.0, 1.0, 0.0], jnp.float32)
    zero = preferences.kto_zero(jnp.asarray([2.0, 0.0, NAN], jnp.float32), reference, weight)
    assert float(zero) == pytest.approx(1.0)  # the mean of 2 and 0
    assert float(preferences.kto_zero(-policy, reference, weight)) == 0.0  # never below 0
    value, rows, metrics = preferences.kto(policy, reference, desirable, weight, 0.5, zero, 1.0, 3.0)
    # Desirable, at the zero: 1 - 0.5. The other, 2 above: 3 * (1 - sigmoid(-1)) = 3 * 0.73105858.
    assert (float(value), float(rows)) == (pytest.approx(0.5 + 3 * 0.73105858), 2.0)
    assert [float(x) for x in metrics["chosen_reward"]] == [0.5, 1.0]
    assert [float(x) for x in metrics["rejected_reward"]] == [1.5, 1.0]
    assert [float(x) for x in metrics["accuracy"]] == [0.5, 2.0]


@pytest.mark.parametrize("case", CASES)
def test_rows_of_weight_0_contribute_nothing(case):
    name, beta, settings = CASES[case]
    objective = OBJECTIVES[name]
    arrays, lens = drawn(0)
    weight = jnp.asarray([1.0, 2.0] * 4 + [0.0] * 8, jnp.float32)

    def both(arrays):
        names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        given = dict(zip(names[: 4 if objective.reference else 2], arrays, strict=False))
        given |= {"chosen_len": lens[0], "rejected_len": lens[1]} if objective.lengths else {}
        loss = objective.loss(**given, weight=weight, beta=beta, **settings)
        return loss[0], loss[1:]

    clean = [each.at[8:].set(0.0) for each in arrays]
    dirty = [each.at[8:].set(jnp.asarray([NAN, INF, -INF, 1e38] * 2, jnp.float32)) for each in arrays]
    wanted, found = (jax.value_and_grad(both, has_aux=True)(each) for each in (clean, dirty))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, wanted)
    assert float(found[0][1][0]) == 12.0 and not np.asarray(found[1][0])[8:].any()
