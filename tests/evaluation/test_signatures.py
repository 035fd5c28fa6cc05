"""Made trainings enter: each known failure is told with its figures, and a sound training is told nothing of."""

import json

import pytest
from etils import epath

from mpo_jax.evaluation import signatures
from mpo_jax.evaluation.sections import Finished


def stage(tmp_path, rows=(), **summary):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


SOUND = [
    ({}, []),
    (report(0.72), held(0.6, 0.5, 0.45)),
    (report(0.72, words=None), held(0.6, 0.5)),
    (report(0.66, error=0.023, words=0.671), []),  # within its error of the words' model
    ({"epochs": 1.0, "prompts": 500}, ppo() + scored((0.5, 0.7, 0.8))),
    ({"epochs": 9.0, "prompts": 500}, ppo()),  # often, and learned
    ({}, scored((0.5, 0.9, 0.85))),  # less than a quarter of the gain
]
WRONG = [
    (report(0.486, error=0.049), [], "right on 0.486 ± 0.049 of 400 held-out pairs, where guessing gives 0.5"),
    (report(0.6, words=0.7), [], "fewer than a TF-IDF model of their words (0.700)"),
    ({}, held(0.6, 0.5, 0.6), "Held-out loss was lowest at step 2 (0.500) and is 0.600 at step 3"),
    ({"epochs": 6.0, "prompts": 30}, ppo(explained=0.05), "It went 6.0 times over 30 prompts"),
    ({"epochs": 1.0, "prompts": 30}, ppo(explained=-0.4), "The value explains -0.40"),
    ({}, scored((0.5, 0.9, 0.6)), "Gold fell by 0.300 from step 2 to the end, while the reward model's score rose by"),
    ({}, scored((0.5, 0.7, 0.8), lens=(40, 50, 60)), "replies grew from 40 to 60 tokens"),
    ({}, scored((0.5, 0.7, 0.8), repeated=(0.01, 0.05, 0.2)), "repeated 4-grams grew from 0.01 to 0.20"),
    ({}, ppo(entropy=(2.0, 0.3)), "Entropy fell from 2.00 to 0.30 nats"),
    ({}, ppo(finished=0.25), "Only 0.25 of the replies end"),
]


@pytest.mark.parametrize(("summary", "rows"), SOUND)
def test_a_sound_training_is_told_nothing_of(tmp_path, summary, rows):
    assert signatures.of_stage(stage(tmp_path, rows, **summary)) == []


@pytest.mark.parametrize(("summary", "rows", "told"), WRONG, ids=[told[:24] for *_, told in WRONG])
def test_each_failure_is_told_once_with_what_to_try(tmp_path, summary, rows, told):
    (sign,) = signatures.of_stages([stage(tmp_path, rows, **summary)])
    assert told in sign.told and sign.attempt.endswith(".") and str(sign).startswith("one: ")
