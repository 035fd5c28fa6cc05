"""What a reward model's scores are worth, on pairs whose answer is known, against scipy's intervals and tests."""

import jinja2
import numpy as np
import pytest
from etils import epath
from scipy import stats

from mpo_jax.evaluation import drift, pairs, reward_model
from mpo_jax.evaluation.sections import Finished


def gaps(count=4000, seed=0, claimed=1.0):
    """Gaps of a model that is right with probability sigmoid(|gap|), and claims sigmoid(claimed * |gap|)."""
    random = np.random.default_rng(seed)
    size = random.exponential(1.5, count)
    return claimed * np.where(random.random(count) < 1 / (1 + np.exp(-size)), size, -size)


def summary(gap):
    scores = np.stack([gap, np.zeros_like(gap)], axis=1)
    lens = np.random.default_rng(1).integers(5, 40, (len(gap), 2))
    report = pairs.pair_report(scores, lens) | {"by_gap_decile": pairs.by_gap_decile(gap), "training_accuracy": 0.75}
    return {"report": report | {"baselines": {"shorter_wins": 0.4, "tfidf_bradley_terry": None}}}


@pytest.mark.parametrize(("won", "count"), [(0, 9), (9, 9), (3, 7), (450, 1000)])
def test_intervals_are_scipys(won, count):
    expected = stats.binomtest(won, count).proportion_ci(method="wilson")
    z = float(stats.norm.ppf(0.975))
    assert pairs.wilson(won / count, count, z) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert pairs.wilson(0.5, 0) == (0.0, 1.0)


def test_intervals_of_a_calibrated_models_bins_cover_what_it_claims():
    found = reward_model.section(Finished("rm", epath.Path("."), {"summary": summary(gaps())}))
    inside = [row["low"] <= row["predicted"] <= row["high"] for row in [*found["calibration"], *found["deciles"]]]
    assert sum(inside) >= 17 and len(inside) == 20  # of 20 intervals of 95 %
    assert found["calibration_error"] == pytest.approx(found["noise"], abs=0.01)
    assert found["longer"] == pytest.approx(0.6) and found["words"] is None


def test_the_noise_of_a_calibration_error_is_what_calibrated_models_show():
    shown, told = [], []
    for seed in range(60):
        rows = pairs.calibration(gaps(400, seed))
        shown.append(pairs.calibration_error(rows, "observed"))
        told.append(reward_model.calibration_noise(rows))
    assert np.mean(shown) == pytest.approx(np.mean(told), rel=0.1)


def test_overconfident_models_are_told_from_calibrated_ones():
    wrong = [reward_model.miscalibrated(pairs.calibration(gaps(800, seed))) for seed in range(60)]
    assert sum(wrong) <= 3  # by chance one in a hundred
    assert all(reward_model.miscalibrated(pairs.calibration(gaps(800, seed, claimed=3.0))) for seed in range(20))
    assert not reward_model.miscalibrated([])


def test_both_figures_hold_what_they_show_and_the_section_is_whole():
    found = reward_model.section(Finished("<b>rm", epath.Path("."), {"summary": summary(gaps(900))}))
    reliability, by_gap = found["figures"]
    assert reliability.columns == by_gap.columns == ("x", "share", "low", "high", "pairs")
    assert sum(row[4] for row in reliability.rows) == sum(row[4] for row in by_gap.rows) == 900
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mpo_jax.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("reward.html").render(rewards=[found])
    assert "<b>" not in page and "None" not in page and "longer reply wins” is right on 0.600" in page
    assert reward_model.section(Finished("rm", epath.Path("."), {"summary": {}})) is None


def test_drift_is_drawn_of_divided_pairs_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/easy_accuracy": 0.6, "eval/easy_reward_margin": 0.1, "eval/hard_accuracy": 0.5}\n'
        '{"step": 2, "eval/easy_accuracy": 0.8, "eval/easy_reward_margin": 0.2, "eval/hard_accuracy": 0.4}\n'
    )
    accuracy, margin = drift.pictures(Finished("dpo", epath.Path(tmp_path), {}))
    assert accuracy.rows == (("easy", 1, 0.6), ("easy", 2, 0.8), ("hard", 1, 0.5), ("hard", 2, 0.4))
    assert margin.rows == (("easy", 1, 0.1), ("easy", 2, 0.2))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/accuracy": 0.6}\n')
    assert list(drift.pictures(Finished("dpo", epath.Path(tmp_path), {}))) == []
    assert pairs.of_bucket({"hard_accuracy": 0.5, "hard_share": 0.25}, "hard", 400) == (0.5, 0.05, 100)
    assert pairs.of_bucket({}, "hard", 400) is None
