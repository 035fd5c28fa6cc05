"""Made trainings enter: each known failure is told with its figures, and a sound training is told nothing of."""

import json

import pytest
from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import signatures
from mpo_jax.evaluation.sections import Finished


def stage(tmp_path, rows=(), **summary):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifacts.write_json(epath.Path(tmp_path) / "config.json", {"stages": {"one": {}}})
    return Finished("one", epath.Path(tmp_path), {"kind": "any", "summary": summary})


def report(accuracy, error=0.02, words=0.55):
    baselines = {"tfidf_bradley_terry": words, "shorter_wins": 0.5}
    return {"report": {"accuracy": accuracy, "accuracy_se": error, "pairs": 400, "baselines": baselines}}


def held(*losses):
    return [{"step": step, "loss": 0.7 - 0.1 * step, "eval/loss": loss} for step, loss in enumerate(losses, 1)]


def ppo(explained=0.6, entropy=(2.0, 1.8), finished=0.9, steps=9):
    rows = [
        {"step": step, "entropy": entropy[0], "finished": finished, "explained_variance": explained}
        for step in range(1, steps)
    ]
    return [*rows, {"step": steps, "entropy": entropy[1], "finished": finished, "explained_variance": explained}]


def scored(gold, reward=(0.0, 1.0, 2.0), lens=(40, 41, 42), repeated=(0.0, 0.0, 0.0)):
    return [
        {"step": step, "eval/score": r, "eval/gold_score": g, "eval/response_len": n, "eval/repetition": again}
        for step, (g, r, n, again) in enumerate(zip(gold, reward, lens, repeated, strict=True), 1)
    ]


def apart(easy, hard, share=0.5):
    """Evaluations of a DPO stage."""
    return [
        {"step": step, "eval/easy_accuracy": e, "eval/hard_accuracy": h, "eval/easy_share": 1 - share,
         "eval/hard_share": share} for step, (e, h) in enumerate(zip(easy, hard, strict=True), 1)
    ]  # fmt: skip


def calibrated(*observed, predicted=0.9):
    bins = [{"pairs": 200, "predicted": predicted, "observed": each} for each in observed]
    return {"report": report(0.72)["report"] | {"calibration": bins, "pairs": 200 * len(bins)}}


def steps(count=12, **values):
    return [{"step": step, "response_len": 20.0} | values for step in range(1, count + 1)]


def learned(held, epochs=6.0):
    return {"epochs": epochs, "prompts": 30}, [
        {"step": step, "score": float(step), "eval/score": value} for step, value in enumerate(held, 1)
    ]


SOUND = [
    ({"watched_pairs": 800}, apart((0.6, 0.8, 0.9), (0.55, 0.6, 0.62))),
    ({"watched_pairs": 800}, apart((0.6, 0.8, 0.7), (0.55, 0.6, 0.5))),  # both fall: not apart
    ({"watched_pairs": 40}, apart((0.6, 0.8, 0.9), (0.55, 0.6, 0.5))),  # within two standard errors
    ({}, []),
    (calibrated(0.9, 0.91), []),
    (calibrated(0.86, 0.88), []),  # 0.03 away, which is little
    learned((0.1, 0.5)),
    ({}, steps(kl=3.0)),
    ({}, steps(5, kl=0.0)),  # too early to say
    ({}, []),
    (report(0.72), held(0.6, 0.5, 0.45)),
    (report(0.72, words=None), held(0.6, 0.5)),
    (report(0.66, error=0.023, words=0.671), []),  # within its error of the words' model
    ({"epochs": 1.0, "prompts": 500}, ppo() + scored((0.5, 0.7, 0.8))),
    ({"epochs": 9.0, "prompts": 500}, ppo()),  # often, and learned
    ({}, scored((0.5, 0.9, 0.85))),  # less than a quarter of the gain
]
WRONG = [
    (report(0.486, error=0.049), [], "right on 0.486 ± 0.049 of 400 held-out pairs; guessing gives 0.5"),
    (report(0.6, words=0.7), [], "a TF-IDF model of their words is right on more (0.700)"),
    ({}, held(0.6, 0.5, 0.6), "Held-out loss was lowest at step 2 (0.500) and is 0.600 at step 3"),
    ({"epochs": 6.0, "prompts": 30}, ppo(explained=0.05), "PPO went 6.0 times over its 30 prompts"),
    ({"epochs": 1.0, "prompts": 30}, ppo(explained=-0.4), "The critic explains -0.40"),
    (
        {},
        scored((0.5, 0.9, 0.6)),
        "The gold score fell by 0.300 from step 2 to the end, while the reward model's score rose by",
    ),
    ({}, scored((0.5, 0.7, 0.8), lens=(40, 50, 60)), "replies grew from 40 to 60 tokens"),
    ({}, scored((0.5, 0.7, 0.8), repeated=(0.01, 0.05, 0.2)), "repeated 4-grams grew from 0.01 to 0.20"),
    ({}, ppo(entropy=(2.0, 0.3)), "Entropy fell from 2.00 to 0.30 nats"),
    (
        {"watched_pairs": 800},
        apart((0.6, 0.8, 0.9), (0.55, 0.65, 0.5)),
        "hard held-out pairs fell from 0.650",
    ),
    (
        calibrated(0.7, 0.72),
        [],
        "should be right on 0.90 of the held-out pairs, but it is right on 0.71",
    ),
    (
        *learned((0.5, 0.1)),
        "the score on them rose from 1.00 to 2.00, while on held-out prompts it went from 0.50 to 0.10",
    ),
    ({}, steps(kl=0.001), "After 12 steps the KL to the reference is 0.001 nats"),
    ({}, steps(kl=50.0), "50.0 nats, 2.50 per token: the policy is too far from it"),
    ({}, steps(kl=3.0, unscored=0.75), "75 % of the prompts had no score"),
    ({}, steps(kl=1.0, updates=1.0) + steps(1, updates=0.0), "1 of 13 logged steps made no update"),
    ({}, steps(5, response_len=1.0), "Replies are 1.0 tokens long"),
    ({}, ppo(finished=0.25), "Only 0.25 of the replies end"),
]


@pytest.mark.parametrize(("summary", "rows"), SOUND)
def test_a_sound_training_is_told_nothing_of(tmp_path, summary, rows):
    assert signatures.of_stage(stage(tmp_path, rows, **summary)) == []


@pytest.mark.parametrize(("summary", "rows", "told"), WRONG, ids=[told[:24] for *_, told in WRONG])
def test_each_failure_is_told_once_with_what_to_try(tmp_path, summary, rows, told):
    (sign,) = signatures.of_stages([stage(tmp_path, rows, **summary)])
    assert told in sign.told and sign.attempt.endswith(".") and str(sign).startswith("one: ")


def test_a_failure_is_told_when_it_appears_and_not_again(tmp_path):
    rows, told = scored((0.5, 0.9, 0.6)), set()
    for count, lines in ((2, 0), (3, 1), (3, 0)):
        stage(tmp_path, rows[:count])
        assert len(signatures.appeared("mpo", epath.Path(tmp_path), {}, told)) == lines


@pytest.fixture
def run(tmp_path):
    """Makes a stage of a run, whose metrics, summary, settings and inputs are given."""
    names = {}

    def make(name, rows=(), inputs=None, summary=None, **settings):
        folder = epath.Path(tmp_path / f"{name}-0")
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        artifacts.write_json(folder / "config.json", {"stages": {name: settings}})
        manifest = {"kind": "any", "summary": summary or {}, "inputs": {
            role: [{"name": source}] for role, source in (inputs or {}).items()}}  # fmt: skip
        artifacts.write_manifest(folder, manifest)
        names[name] = folder.name
        artifacts.write_json(epath.Path(tmp_path / "stages.json"), names)
        return Finished(name, folder, manifest)

    return make


def test_scores_beyond_what_the_reward_model_was_trained_on(run):
    run("reward", summary={"statistics": {"mean": 0.0, "std": 1.0, "high": 2.0}})
    run("old", summary={"statistics": {"mean": 0.0, "std": 1.0}})
    given = {"inputs": {"reward": "reward"}}
    (sign,) = signatures.of_stage(run("mpo", steps(score=2.1), **given))
    assert "The mean score is 2.10 at the end, beyond 2.00" in sign.told and sign.figure == "training-mpo"
    assert signatures.of_stage(run("within", steps(score=1.9), **given)) == []
    assert signatures.of_stage(run("asked", steps(score=2.1), scorer="vader", **given)) == []
    assert signatures.of_stage(run("earlier", steps(score=2.3), inputs={"reward": "old"})) == []
    assert len(signatures.of_stage(run("far", steps(score=2.4), inputs={"reward": "old"}))) == 1


def test_kl_far_above_its_target(run):
    (sign,) = signatures.of_stage(run("mpo", steps(kl=15.0), kl_target=4.0))
    assert "15.0 nats at the end, but kl_target is 4" in sign.told
    assert signatures.of_stage(run("held", steps(kl=6.0), kl_target=4.0)) == []


def test_gold_and_judges_that_say_the_opposite_of_the_reward_model(run):
    def each(by, rate, p, left="mpo"):
        return {"left": left, "right": "sft", "by": by, "win_rate": rate, "adjusted_p": p}

    mine = [each("the reward model", 0.8, 1e-4), each("the reward model", 0.7, 0.2, "dpo")]
    evaluate = run("evaluate")
    for gold, signs in ((each("the gold labeller", 0.3, 1e-3), 1), (each("the gold labeller", 0.3, 0.3), 0)):
        artifacts.write_json(evaluate.folder / artifacts.REPORT, {"comparisons": [*mine, gold]})
        found = signatures.of_stage(evaluate)
        assert len(found) == signs
        words = "mpo wins against sft in 80 % of the prompts by the reward model, but in 30 % by the gold"
        assert all(words in each.told and each.figure == "evaluation-evaluate" for each in found)
    judged = {"inputs": {"evaluate": "evaluate"}}
    (sign,) = signatures.of_stage(run("judge", summary={"pairs": [each("qwen", 0.2, 0.01)]}, **judged))
    assert sign.figure == "judged-judge" and "20 % by qwen" in sign.told
    for name, one in (("agrees", each("qwen", 0.9, 0.01)), ("unsure", each("qwen", 0.2, 0.01, "dpo"))):
        assert signatures.of_stage(run(name, summary={"pairs": [one]}, **judged)) == []


def test_a_loss_that_is_no_number_is_not_called_overfitted(tmp_path):
    made = stage(tmp_path, held(float("nan"), 2.0, float("nan")))
    assert not [sign for sign in signatures.of_stage(made) if "overfitted" in sign.told]
    assert [sign for sign in signatures.of_stage(stage(tmp_path, held(1.0, 1.5, 2.0))) if "overfitted" in sign.told]
