"""Curves of score against KL: values by hand, against numpy's interpolation, and coverage of a known truth."""

import numpy as np
import pytest
from scipy import stats

from mpo_jax.evaluation import curves, statistics, verdict
from mpo_jax.evaluation.curves import Curve


def curve(kl, score, prompts=200, noise=0.0, seed=0, **options) -> Curve:
    """A curve whose prompts have these means and a common difficulty."""
    random = np.random.default_rng(seed)
    hard = random.normal(size=prompts)
    hard -= hard.mean()
    wide = [np.asarray(each, float)[:, None] + noise * hard for each in (kl, score)]
    steps = options.pop("steps", range(len(kl)))
    return Curve(list(steps), *wide, **({"final": len(kl) - 1} | options))


def test_between_points_it_is_numpy_s_interpolation():
    random = np.random.default_rng(1)
    kl, score = np.sort(random.uniform(0, 5, (50, 6)), 1), random.normal(size=(50, 6))
    for value in (0.5, 2.0, 4.0):
        found = curves.at(kl, score, value)
        for row in range(50):
            if kl[row, 0] <= value <= kl[row, -1]:
                assert found[row] == pytest.approx(np.interp(value, kl[row], score[row]))
            else:
                assert np.isnan(found[row]), "nothing is extrapolated"


def test_a_curve_that_turns_back_counts_where_it_first_meets_a_kl():
    kl, score = np.array([0.0, 2.0, 1.0, 3.0]), np.array([0.0, 1.0, 5.0, 9.0])
    assert float(curves.at(kl, score, 1.5)) == pytest.approx(0.75)
    assert float(curves.at(kl, score, 2.5)) == pytest.approx(8.0)
    assert float(curves.at(np.array([1.0, 1.0, 2.0]), np.array([3.0, 4.0, 5.0]), 1.0)) == 3.0
    assert np.isnan(curves.at(np.array([1.0]), np.array([2.0]), 1.0)), "a single point is no curve"


def test_the_table_s_values_lie_where_two_curves_are():
    made = {"a": curve([0, 2, 6], [0, 1, 2]), "b": curve([0, 4], [0, 1]), "c": curve([1.5, 3.1], [0, 1])}
    shown = curves.section(made, "a", "the gold labeller", "sft")
    assert shown["values"] == [0.8, 1.6, 2.4, 3.2, 4.0]
    cells = {name: [None if cell is None else cell["mean"] for cell in row] for name, row in shown["scores"].items()}
    assert cells["a"] == pytest.approx([0.4, 0.8, 1.1, 1.3, 1.5])
    assert cells["b"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [cell is None for cell in cells["c"]] == [True, False, False, True, True]
    alone = curves.section({"a": made["a"], "sft": curve([0], [0])}, "a", "the gold labeller", "sft")
    assert alone["values"] == [] and list(alone["scores"]) == ["a"] and list(alone["points"]) == ["a", "sft"]
    assert [point["final"] for point in alone["points"]["a"]] == [False, False, True]


def test_an_end_that_is_not_surely_reached_has_no_score():
    random = np.random.default_rng(3)
    kl = np.stack([np.zeros(100), random.normal(2.0, 2.0, 100)])
    made = {"a": Curve([0, 1], kl, kl, 1), "b": curve([0, 5], [0, 5], 100)}
    shown = curves.section(made, "b", "the gold labeller", "sft")
    end = kl[1].mean()
    assert shown["values"][-1] < end - 1.5 * kl[1].std() / 10
    assert all(cell is not None for cell in shown["scores"]["a"])
    assert curves._score(made["a"], (kl.mean(1)[None], kl.mean(1)[None]), end + 0.1) is None


def test_at_equal_kl_the_one_further_away_is_read_along_its_curve():
    made = {
        "mpo": curve([1, 3, 7], [0.4, 0.8, 1.0], noise=0.1, begins="dpo"),
        "sft": curve([0], [0.0], noise=0.1),
        "dpo": curve([0, 1], [0, 0.4], noise=0.1, begins="sft"),
        "ppo": curve([0, 2, 5], [0, 0.3, 0.8], noise=0.1, begins="sft"),
        "far": curve([0, 6, 9], [0, 0.95, 0.99], noise=0.1, begins="sft"),
    }
    shown = curves.section(made, "mpo", "the gold labeller", "sft", resamples=500)
    rows = {row["name"]: row for row in shown["against"]}
    assert list(rows) == ["sft", "dpo", "ppo", "far"]
    assert rows["dpo"]["begins"] and rows["dpo"]["difference"] is None
    assert rows["sft"]["difference"] is None and not rows["sft"]["begins"]
    assert rows["ppo"]["ends"] == "ppo" and rows["ppo"]["kl"] == pytest.approx(5)
    assert rows["ppo"]["difference"]["mean"] == pytest.approx(0.9 - 0.8)
    assert rows["far"]["ends"] == "mpo" and rows["far"]["difference"]["mean"] == pytest.approx(1 - (0.95 + 0.04 / 3))
    given = {"name": "mpo", "sentences": ["mpo is better than sft."]}
    told = verdict.at_equal_kl(given, shown)
    assert told["sentences"] == ["mpo is better than sft.", told["at_equal_kl"]]
    assert told["at_equal_kl"].startswith("At equal KL to sft, mpo is better than ppo (+0.1")
    assert told["at_equal_kl"].endswith(
        "Its training begins with dpo, so that they are one policy at that KL. No curve of the two surely reaches the "
        "other's KL for sft."
    )
    assert verdict.at_equal_kl(None, shown) is None
    none = shown | {"against": [row for row in shown["against"] if row["difference"] is None]}
    assert verdict.at_equal_kl(given, none)["at_equal_kl"].startswith(
        "At equal KL to sft, mpo can't be compared with the others. Its training begins with dpo, so"
    )
    assert verdict.at_equal_kl(given, shown | {"against": []}) == given


def test_two_equal_policies_are_not_shown_to_differ():
    """Their scores rise alike with KL; the other's replies are others, and its training ends earlier."""
    noise = np.random.default_rng(5).normal(size=(2, 3, 150))
    noise -= noise.mean(-1, keepdims=True)
    kl = np.array([0.0, 2.0, 4.0])[:, None] + 0.3 * noise[0]
    made = {"a": Curve([0, 1, 2], kl, 0.5 * kl, 2), "b": Curve([0, 1, 2], kl - 0.4, 0.5 * (kl - 0.4) + noise[1], 2)}
    shown = curves.section(made, "a", "the gold labeller", "sft")
    assert shown["against"][0]["difference"]["mean"] == pytest.approx(0, abs=1e-9)
    assert "a is not shown to differ from b (" in verdict.equal_kl_sentence("a", shown["against"], "sft")


def test_intervals_cover_the_truth_and_p_values_are_even():
    """Two policies whose scores rise alike with KL, one trained further: at equal KL there is no difference."""
    covered, small, runs = 0, 0, 300
    for seed in range(runs):
        random = np.random.default_rng(seed)
        hard = random.normal(size=60)
        kl = [np.abs(random.normal(mean, 0.5, 60)) for mean in (2.0, 4.0)]
        level = [np.full(60, each.mean()) * 0 + mean for each, mean in zip(kl, (2.0, 4.0), strict=True)]
        far = Curve([1, 2], np.stack(kl), np.stack([each + hard + random.normal(size=60) for each in level]), 1)
        near = np.abs(random.normal(3.0, 0.5, 60))
        made = {"far": far, "near": Curve([1], near[None], (3.0 + hard + random.normal(size=60))[None], 0)}
        row = curves.section(made, "far", "the gold labeller", "sft", resamples=400, seed=seed)["against"][0]
        covered += row["difference"]["low"] <= 0 <= row["difference"]["high"]
        small += row["difference"]["p_value"] < 0.05
    assert stats.binomtest(covered, runs, 0.95).pvalue > 0.001, covered / runs
    assert stats.binomtest(small, runs, 0.05).pvalue > 0.001, small / runs


def test_a_mean_s_interval_is_the_bootstrap_of_statistics():
    score = np.random.default_rng(2).uniform(size=80)
    shown = curves.section(
        {"a": Curve([0, 1], np.stack([np.zeros(80), np.ones(80)]), np.stack([score, score]), 1),
         "b": curve([0, 1], [0, 1], 80)}, "a", "the gold labeller", "sft", resamples=4000,
    )  # fmt: skip
    low, high = statistics.bootstrap_interval(score, 4000)
    for cell in shown["scores"]["a"]:
        assert (cell["low"], cell["high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert shown["points"]["a"][0]["score_error"] == pytest.approx(stats.sem(score))
