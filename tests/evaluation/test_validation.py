"""A reward model's validation on made data whose answer is known, and the report's sections as a browser reads them."""

import itertools
import json

import jinja2
import numpy as np
import pytest
from etils import epath
from scipy import stats

from mpo_jax import artifacts
from mpo_jax.data import encode
from mpo_jax.data.tokenizer import Conventions
from mpo_jax.evaluation import annotation, human, judge, pairs, sections, validation
from mpo_jax.evaluation.sections import Finished
from tests.evaluation import made


def calibrated_gaps(count=20_000, seed=0):
    """Gaps of a reward model that knows how sure it is: the label agrees with probability sigmoid(|gap|)."""
    random = np.random.default_rng(seed)
    size = random.exponential(1.5, count)
    return np.where(random.random(count) < 1 / (1 + np.exp(-size)), size, -size)


def test_deciles_of_a_calibrated_model():
    rows = pairs.by_gap_decile(calibrated_gaps())
    assert [row["pairs"] for row in rows] == [2000] * 10
    assert all(before["to"] <= after["from"] for before, after in itertools.pairwise(rows))
    for row in rows:
        assert row["accuracy"] == pytest.approx(row["predicted"], abs=4 * row["standard_error"])
    assert rows[0]["accuracy"] < 0.56 and rows[-1]["accuracy"] > 0.95
    assert pairs.calibration_error(rows) < 0.015


def test_overconfidence_shows_as_calibration_error():
    """Ten times the gaps, the same labels: the model claims near certainty, and is right no more often."""
    gap = calibrated_gaps()
    rows = pairs.by_gap_decile(10 * gap)
    share = (gap > 0).mean()
    claimed = np.mean(1 / (1 + np.exp(-10 * np.abs(gap))))
    assert pairs.calibration_error(rows) == pytest.approx(claimed - share, abs=0.02)
    assert pairs.calibration_error(rows) > 0.15


def test_deciles_by_hand():
    rows = pairs.by_gap_decile(np.array([-0.1, 0.2, 0.0]))
    assert [(row["from"], row["accuracy"]) for row in rows] == [(0.0, 0.5), (0.1, 0.0), (0.2, 1.0)]


def test_correlation_with_confidence():
    random = np.random.default_rng(0)
    confidence = random.integers(1, 10, 300).astype(np.float32)
    gap = confidence / 3 + random.normal(0, 2, 300)
    found = validation.with_confidence(np.append(gap, 99), np.append(confidence, np.nan))
    expected = stats.kendalltau(gap, confidence)  # another rank statistic, of the same sign and weight
    assert found["pairs"] == 300 and found["spearman"] > 0.3 and found["p_value"] < 1e-6 and expected.pvalue < 1e-6
    monotone = validation.with_confidence(np.exp(confidence), confidence)
    assert monotone["spearman"] == pytest.approx(1)
    assert validation.with_confidence(gap[:10], confidence[:10]) is None
    assert validation.with_confidence(gap, np.full(300, np.nan)) is None
    assert validation.with_confidence(gap, np.full(300, 5.0)) is None


def test_over_optimisation_curve():
    """Reward rises throughout, gold rises until step 20 and falls after."""
    rows = [{"step": step, "eval/score": step / 10, "eval/gold_score": 1 - ((step - 20) / 20) ** 2, "eval/kl": step / 5}
            for step in range(0, 50, 10)]  # fmt: skip
    found = validation.over_optimisation([*rows, {"step": 41, "loss": 3.0}])
    assert [point["gold"] for point in found["points"]] == [0.0, 0.75, 1.0, 0.75, 0.0]
    assert found["best"]["step"] == 20 and found["lost"] == pytest.approx(1.0) and found["gained"] == pytest.approx(2.0)
    assert found["correlation"] == pytest.approx(0)
    gold_learned = [{"step": n, "eval/score": float(n), "eval/reward_score": 2.0 * n} for n in range(3)]
    found = validation.over_optimisation(gold_learned)
    assert found["points"][2] == {"step": 2, "kl": None, "reward": 4.0, "gold": 2.0} and found["lost"] == 0
    assert validation.over_optimisation([{"step": 1, "eval/score": 1.0}] * 3) is None
    assert validation.over_optimisation([]) is None


@pytest.fixture
def run(tmp_path):
    """A run's folder with what the three sections read; names as bad as a user may choose."""
    names = ("sft", "<b>mpo</b>")
    lines = made.rows(30, names)
    made.run_folder(tmp_path, lines)
    stages = {"evaluate": epath.Path(tmp_path / json.loads((tmp_path / "stages.json").read_text())["evaluate"])}
    artifacts.write_json(stages["evaluate"] / "config.json", {"stages": {"evaluate": {"kind": "evaluate"}}})
    for name, kind in (("split", "split"), ("mpo", "ppo"), ("judge", "judge")):
        stages[name] = epath.Path(tmp_path / f"{name}-0")
        stages[name].mkdir()
        settings = {"kind": kind, "pair_source": "dataset", "labeller": ""}
        artifacts.write_json(stages[name] / "config.json", {"stages": {name: settings}})
    gap = calibrated_gaps(400)
    artifacts.write_gaps(stages["split"], made.gap_table(gap))
    pieces = [np.array([1], np.int32)] * 1200
    rows = encode.assemble(
        pieces, 2, Conventions(0, 0, 0, False), "k",
        id=np.arange(400), prompt_id=np.arange(400), confidence=np.abs(gap).astype(np.float32),
    )  # fmt: skip
    encode.write(rows, tmp_path / "split-0" / "pairs")
    points = [{"step": n, "eval/score": float(n), "eval/gold_score": float(-n)} for n in range(3)]
    (stages["mpo"] / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    table = judge.by_scores(lines, [(names[1], names[0])], "the reward model", "reward", 200)
    artifacts.write_json(stages["judge"] / artifacts.JUDGE_TABLE, table)
    with annotation.Store(tmp_path / artifacts.ANNOTATIONS) as store:
        for item in annotation.items(lines, [(names[1], names[0])], 0):
            for person in ("ada", "<script>"):
                store.put(annotation.judge(item, person, 0, "first"))
    return tmp_path, stages


def test_sections_render_whole_and_escaped(run):
    workdir, stages = run
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mpo_jax.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    finished = {name: Finished(name, stage, {"name": name}) for name, stage in stages.items()}
    parts = {
        "judge": [sections.verdicts(finished["judge"])],
        "human": human.section(human.judged(epath.Path(workdir)), stages),
        "validation": validation.section(finished.values()),
    }
    for name, found in parts.items():
        assert found is not None
        shown = environment.get_template(f"{name}.html").render({name: found})
        assert "<b>mpo" not in shown and "<script" not in shown
        assert "None" not in shown and "nan" not in shown.split("base64")[0]
    assert parts["validation"]["splits"][0]["accuracy"] > 0.6
    assert parts["validation"]["splits"][0]["confidence"]["spearman"] > 0
    assert parts["human"]["stages"][0]["judgements"] == 60


def test_absent_sections_are_none(tmp_path):
    assert validation.section([]) is None
    assert human.section(human.judged(epath.Path(tmp_path)), {}) is None
