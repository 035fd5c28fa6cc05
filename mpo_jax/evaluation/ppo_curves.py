"""A finished PPO stage enters; the pictures of its training that need more than one number a step leave: scores beside
the range that the reward model was trained on, KL beside its target."""

from collections.abc import Iterable
from typing import Any

from mpo_jax import artifacts, metrics
from mpo_jax.evaluation import figures
from mpo_jax.evaluation.sections import Finished

_SCORES = {"training": "score", "held out": "eval/score", "gold, held out": "eval/gold_score",
           "reward model, held out": "eval/reward_score"}  # fmt: skip
_KL = {"training": "kl", "held out": "eval/kl"}
_SHIFT = 2.33
"""Standard deviations above the mean where the 99th percentile of a normal law lies: for reward models of earlier
versions, which kept no percentiles."""


def pictures(stage: Finished) -> Iterable[figures.Drawn]:
    """Score and KL along training and, of an adaptive penalty, its coefficient; where replies went without a score, how
    many."""
    rows, settings = metrics.read(stage.folder), stage.settings
    high = highest(stage)
    target = settings.get("kl_target") or 0.0
    drawn = [
        (_SCORES, "score", {} if high is None else {"99 % of the reward model's training replies": high}),
        (_KL, "KL to the reference, nats", {"target": target} if target else {}),
        ({"training": "kl_coefficient"} if target else {}, "coefficient of the KL penalty", {}),
        ({"training": "unscored"}, "share of prompts without a score", {}),
    ]
    for names, label, levels in drawn:
        curves = {name: found for name, key in names.items() if (found := metrics.points(rows, key))}
        if curves:
            yield figures.lines(curves, "step", label, levels=levels)


def highest(stage: Finished) -> float | None:
    """The 99th percentile of the scores that the reward model gives to the replies it was trained on; None where
    another scorer is learned from, or its statistics are not there."""
    statistics = _statistics(stage)
    if statistics is None or stage.settings.get("scorer", "reward") != "reward":
        return None
    return statistics.get("high", statistics["mean"] + _SHIFT * statistics["std"])


def _statistics(stage: Finished) -> dict[str, Any] | None:
    """Of the scores of the reward model that a stage has learned from."""
    folder = stage.read_as("reward")
    manifest = None if folder is None else artifacts.read_manifest(folder)
    return ((manifest or {}).get("summary") or {}).get("statistics")
