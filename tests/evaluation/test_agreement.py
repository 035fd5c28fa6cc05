"""Agreement against the krippendorff package and a published example; its interval against simulated truth."""

import krippendorff
import numpy as np
import pytest
from scipy import stats

from mpo_jax.evaluation import agreement, human, statistics
from mpo_jax.evaluation.judge_prompts import FIRST, SECOND, TIE

MISSING = np.nan
PUBLISHED = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, MISSING, MISSING, MISSING],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, MISSING, 3],
    [MISSING, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, MISSING],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, MISSING],
])  # fmt: skip
"""Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), example C: four observers, twelve units."""


def test_the_published_example():
    found = agreement.alpha(PUBLISHED, range(12))
    assert found.alpha == pytest.approx(0.815, abs=5e-4) and found.units == 11
    assert found.low < found.alpha < found.high <= 1


@pytest.mark.parametrize("seed", range(20))
def test_alpha_is_that_of_the_package(seed):
    """Random verdicts of two to five judges, some missing, with agreement of every degree."""
    random = np.random.default_rng(seed)
    judges, units = random.integers(2, 6), random.integers(8, 80)
    truth = random.choice([0.0, 0.5, 1.0], units)
    noise = random.choice([0.0, 0.5, 1.0, 0.25], (judges, units))
    table = np.where(random.random((judges, units)) < random.random(), noise, truth)
    table[random.random((judges, units)) < 0.3] = np.nan
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement="ordinal")
    assert agreement.alpha(table, range(units)).alpha == pytest.approx(expected, abs=1e-12)


def tables(random, units, count, noise):
    """Verdicts of two judges who each put another verdict in the place of the truth now and then."""
    truth = random.choice([0.0, 0.5, 1.0], (count, units), p=[0.3, 0.2, 0.5])
    said = [np.where(random.random((count, units)) < noise, random.choice([0.0, 0.5, 1.0], (count, units)), truth)
            for _ in range(2)]  # fmt: skip
    return np.stack(said, 1)


@pytest.mark.parametrize("noise", [pytest.param(0.15, marks=pytest.mark.slow), 0.5])
def test_the_interval_covers_the_truth(noise):
    random = np.random.default_rng(0)
    truth = agreement.alpha(tables(random, 100_000, 1, noise)[0], range(100_000), resamples=10).alpha
    found = [agreement.alpha(table, range(120), 400, seed=3) for table in tables(random, 120, 400, noise)]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    print(f"covered {covered:.3f}")
    assert 0.92 <= covered <= 0.975


def test_verdicts_on_one_prompt_are_resampled_together():
    """Each prompt's verdict eight times over, as of eight pairs of policies: no narrower than once."""
    once = tables(np.random.default_rng(1), 60, 1, 0.4)[0]
    single = agreement.alpha(once, range(60))
    many = agreement.alpha(np.repeat(once, 8, axis=1), np.repeat(np.arange(60), 8))
    assert many.alpha == pytest.approx(single.alpha, abs=0.02)
    assert (many.high - many.low) / (single.high - single.low) == pytest.approx(1, abs=0.1)


def test_where_nothing_can_be_said():
    assert agreement.alpha([[1.0, 0.5, np.nan], [np.nan, np.nan, 1.0]], range(3)) is None, "nothing shared"
    assert agreement.alpha([[1.0] * 9, [1.0] * 9], range(9)) is None, "all alike throughout"
    assert agreement.alpha(np.zeros((2, 0)), []) is None
    alike = agreement.alpha([[0.0, 1.0] * 20] * 2, range(40))
    assert alike.alpha == 1 == alike.high and 0.7 < alike.low < 0.9, "40 prompts prove no perfection"


def lines(verdicts, left="mpo", right="sft"):
    """Of both orders, a pair of verdicts for each prompt."""
    return [
        {"prompt_id": number, "left": left, "right": right, "first": first, "verdict": verdict}
        for number, both in enumerate(verdicts)
        for first, verdict in zip((left, right), both, strict=True)
    ]


def test_two_judges_of_the_same_replies():
    """As both orders say; a judge whose table names the policies the other way round agrees all the same."""
    said = [(FIRST, SECOND), (SECOND, FIRST), (TIE, TIE), (FIRST, FIRST), (None, SECOND), (FIRST, TIE)]
    one = agreement.of_lines(lines(said))
    assert one == {("mpo", "sft", number): won for number, won in enumerate([1.0, 0.0, 0.5, 0.5])} | {
        ("mpo", "sft", 5): 0.5
    }
    other = agreement.of_lines(lines([(b, a) for a, b in said], "sft", "mpo"))
    found = agreement.between({"a": one, "b": other, "c": {("mpo", "dpo", 0): 1.0}})
    assert [(each["one"], each["other"], each["units"]) for each in found] == [("a", "b", 5)]
    assert found[0]["alpha"] == 1 and found[0]["same"] == 1


def test_people_s_outcomes_are_averaged():
    from mpo_jax.evaluation import annotation
    from tests.evaluation import made

    rows = made.rows(4)
    items = annotation.items(rows, [("mpo", "sft")], 0)
    given = [annotation.judge(item, "ada", 0, "first" if annotation.left_first(item, "ada", 0) else "second")
             for item in items] + [annotation.judge(items[0], "bob", 0, "tie")]  # fmt: skip
    found = human.outcomes(rows, given)
    assert found[("mpo", "sft", items[0].prompt_id)] == 0.75
    assert sorted(found.values()) == [0.75, 1.0, 1.0, 1.0]


def test_the_interval_of_a_ratio_covers_the_truth_where_verdicts_come_in_pairs():
    """A judge half of whose prompts get the first reply in both orders: its decisions are no independent trials."""
    random = np.random.default_rng(0)
    covered = {"ratio": 0, "independent": 0}
    for _ in range(400):
        decided = random.choice([1, 2], 100)
        first = np.where(random.random(100) < 0.6, decided, 0)
        truth = 0.6
        low, high = statistics.ratio_interval(first, decided, 400)
        covered["ratio"] += low <= truth <= high
        wilson = stats.binomtest(int(first.sum()), int(decided.sum())).proportion_ci(0.95, "wilson")
        covered["independent"] += wilson.low <= truth <= wilson.high
    assert 0.92 <= covered["ratio"] / 400 <= 0.975
    assert covered["independent"] / 400 < 0.9, "as if each decision were a trial of its own"
    assert statistics.ratio_interval([0, 0], [0, 0]) is None
    low, high = statistics.ratio_interval([2] * 60, [2] * 60)
    assert 0.9 < low < high == 1
