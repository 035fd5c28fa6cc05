"""Win rates held against closed forms, R's p.adjust, scikit-learn, and simulated tables whose truth is known."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from mpo_jax.errors import InputError
from mpo_jax.evaluation import statistics
from mpo_jax.evaluation.statistics import Comparison


def simulated(tables: int, prompts: int, chances=(0.3, 0.2, 0.5), seed=0) -> tuple[np.ndarray, float]:
    """Outcomes [tables, prompts] of a judge who calls 0, 0.5, 1 with the given chances, and the true win rate."""
    values = np.array([0.0, 0.5, 1.0])
    return np.random.default_rng(seed).choice(values, (tables, prompts), p=chances), float(values @ chances)


def test_outcomes_of_scores():
    assert statistics.outcomes([1.0, 2.0, 3.0], [0.5, 2.0, 4.0]).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(InputError, match="finite"):
        statistics.outcomes([1.0, np.nan], [0.5, 2.0])


def test_a_difference_is_the_paired_t_test():
    left, right = np.random.default_rng(0).normal(size=(2, 40)) + np.array([[0.3], [0.0]])
    found, known = statistics.difference(left, right), stats.ttest_rel(left, right)
    interval = known.confidence_interval()
    assert found.mean == pytest.approx(np.mean(left - right)) and found.p_value == pytest.approx(known.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert statistics.difference([1.0, 2.0], [1.0, 2.0]) == statistics.Difference(0.0, 0.0, 0.0, 1.0)
    assert statistics.difference([1.5, 2.5], [1.0, 2.0]) == statistics.Difference(0.5, 0.5, 0.5, 0.0)
    for wrong in ([1.0], [np.nan, 1.0]):
        with pytest.raises(InputError, match="finite"):
            statistics.difference(wrong, wrong)


@pytest.mark.parametrize(
    ("prompts", "chances"),
    [(128, (0.3, 0.2, 0.5))]
    + [
        pytest.param(prompts, chances, marks=pytest.mark.slow)
        for prompts, chances in [
            (500, (0.3, 0.2, 0.5)), (128, (0.45, 0.05, 0.5)), (500, (0.45, 0.05, 0.5)),
            (128, (0.1, 0.0, 0.9)), (500, (0.1, 0.0, 0.9)),
        ]
    ],
)  # fmt: skip
def test_intervals_cover_the_truth_at_their_rate(prompts, chances):
    tables, truth = simulated(2000, prompts, chances)
    intervals = np.array([statistics.bootstrap_interval(row, 1000, seed=n) for n, row in enumerate(tables)])
    covered = np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
    assert 0.94 <= covered <= 0.96, covered


def test_interval_agrees_with_scipy_s_bootstrap_and_with_the_normal_one():
    won = simulated(1, 500)[0][0]
    low, high = statistics.bootstrap_interval(won, 20_000)
    theirs = stats.bootstrap((won,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    np.testing.assert_allclose([low, high], [theirs.low, theirs.high], atol=2.5e-3)
    half = 1.96 * won.std(ddof=1) / np.sqrt(500)
    np.testing.assert_allclose([low, high], [won.mean() - half, won.mean() + half], atol=2.5e-3)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_unanimous_outcomes_leave_room_for_what_was_not_seen(value):
    low, high = statistics.bootstrap_interval(np.full(100, value))
    exact = stats.binomtest(0, 100).proportion_ci(0.95, "exact").high
    assert high - low == pytest.approx(exact)
    assert 0 <= low <= value <= high <= 1


def test_same_seed_same_interval():
    won = simulated(1, 60)[0][0]
    assert statistics.bootstrap_interval(won, seed=3) == statistics.bootstrap_interval(won, seed=3)
    assert statistics.bootstrap_interval(won, seed=3) != statistics.bootstrap_interval(won, seed=4)


def test_sign_test_by_hand():
    assert statistics.sign_test([1, 1, 1, 1, 1, 0.5]) == pytest.approx(2 / 32)  # 5 of 5; the tie is left out
    assert statistics.sign_test([1, 1, 1, 0]) == pytest.approx(2 * (1 + 4) / 16)
    assert statistics.sign_test([0.5, 0.5]) == 1.0


@pytest.mark.parametrize(("part", "whole"), [(0, 20), (7, 20), (20, 20), (260, 500)])
def test_the_sign_test_as_in_scipy(part, whole):
    found = stats.binomtest(part, whole)
    assert statistics.sign_test([1.0] * part + [0.0] * (whole - part)) == pytest.approx(found.pvalue)


def test_holm_as_in_r():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")"""
    given = [Comparison("a", "b", "x", 9, 0.6, 0.5, 0.7, p) for p in (0.01, 0.04, 0.03, 0.005)]
    adjusted = statistics.holm(given)
    assert [c.adjusted_p for c in adjusted] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [c.p_value for c in adjusted] == [0.01, 0.04, 0.03, 0.005]
    assert statistics.holm([]) == []


def test_holm_keeps_the_family_s_error():
    """Ten comparisons without any difference: at most 5 % of the families call one of them significant."""
    tables, _ = simulated(1000, 100, (0.5, 0.0, 0.5))
    p_values = np.array([statistics.sign_test(row) for row in tables]).reshape(100, 10)
    families = [[Comparison("a", "b", "x", 100, 0.5, 0, 1, p) for p in row] for row in p_values]
    wrong = np.mean([min(c.adjusted_p for c in statistics.holm(family)) < 0.05 for family in families])
    uncorrected = np.mean(p_values.min(1) < 0.05)
    assert wrong <= 0.05 < uncorrected


def test_sample_size_gives_the_power_it_promises():
    """Closed form for 60 %: ((1.95996 / 2 + 0.84162 sqrt(0.24)) / 0.1)^2 = 193.8; then 4,000 simulated studies."""
    prompts = statistics.sample_size(0.6)
    assert prompts == 194
    assert statistics.sample_size(0.4) == prompts
    wins = np.random.default_rng(0).binomial(prompts, 0.6, 4000)
    z = (wins / prompts - 0.5) / np.sqrt(0.25 / prompts)
    assert np.mean(np.abs(z) > 1.959964) == pytest.approx(0.8, abs=0.025)
    with pytest.raises(InputError, match="no number of prompts"):
        statistics.sample_size(0.5)


def test_length_controlled_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    difference = rng.normal(15, 30, 20_000)
    won = (rng.random(20_000) < 1 / (1 + np.exp(-(0.3 + 0.03 * difference)))).astype(float)
    column = np.tanh(difference / difference.std())[:, None]
    theirs = LogisticRegression(C=np.inf).fit(column, won)
    expected = 1 / (1 + np.exp(-theirs.intercept_[0]))
    assert statistics.length_controlled(won, difference) == pytest.approx(expected, abs=1e-3)
    assert won.mean() > expected + 0.05


def test_length_controlled_without_a_difference_is_the_win_rate():
    """Firth's estimate for an intercept alone is (wins + 1/2) / (prompts + 1)."""
    won = simulated(1, 200)[0][0]
    assert statistics.length_controlled(won, np.zeros(200)) == pytest.approx((won.sum() + 0.5) / 201)


def test_judge_that_only_measures_is_unmasked_by_length_control():
    difference = np.random.default_rng(1).normal(20, 25, 400)
    comparison = statistics.compare("long", "short", "ruler", (difference > 0).astype(float), difference)
    assert comparison.win_rate > 0.75
    assert comparison.length_controlled == pytest.approx(0.5, abs=0.1)


def test_judge_that_ignores_length_keeps_its_win_rate():
    rng = np.random.default_rng(2)
    won = (rng.random(2000) < 0.65).astype(float)
    comparison = statistics.compare("a", "b", "x", won, rng.normal(20, 25, 2000))
    assert comparison.length_controlled == pytest.approx(comparison.win_rate, abs=0.03)


def test_sentence():
    comparison = Comparison("MPO", "DPO", "reward", 500, 0.61, 0.57, 0.65, 1e-6, 2e-6, 0.58)
    assert statistics.sentence(comparison) == (
        "MPO preferred to DPO in 61 % ± 4 of 500 prompts by reward, 58 % between replies of equal length (p < 0.001)."
    )
    weak = statistics.sentence(Comparison("MPO", "DPO", "annotators", 50, 0.6, 0.46, 0.74, 0.2))
    assert weak.endswith(
        "(p = 0.2: not distinguishable from chance; for such a win rate that would need about 194 prompts)."
    )


@pytest.mark.parametrize("bad", [[], [0.5, 1.5], [np.nan], [[0.5]]])
def test_outcomes_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match="outcomes of shape"):
        statistics.compare("a", "b", "x", bad)
