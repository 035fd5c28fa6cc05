"""A reward model's gaps on pairs it never saw, and PPO's scores as it learns, enter; what the scores are worth leaves.

The check that the paper leaves open: are pairs with a large gap the ones that people are sure of, and does the policy
that pleases the reward model please the gold labeller too?
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts, metrics
from mpo_jax.evaluation import figures
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation.sections import Finished

_FEWEST = 20
"""Pairs with a known confidence, below which their correlation is not worth a line."""


def with_confidence(gap: np.ndarray, confidence: np.ndarray) -> dict[str, float] | None:
    """Spearman's rank correlation of the gap with the annotator's confidence in the chosen reply, with its two-sided
    p-value; None where too few confidences are known (finite), or all are the same."""
    known = np.isfinite(confidence)
    if known.sum() < _FEWEST or np.ptp(confidence[known]) == 0 or np.ptp(gap[known]) == 0:
        return None
    from scipy import stats  # a third of a command's start, and only reports of data with confidences need it

    found = stats.spearmanr(gap[known], confidence[known])
    return {"pairs": int(known.sum()), "spearman": float(found.statistic), "p_value": float(found.pvalue)}


def over_optimisation(rows: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The reward model's mean score and the gold labeller's at each evaluation of a PPO stage; None without both.

    rows: the stage's metrics. points: {step, kl, reward, gold}. best: the point with the highest gold score. lost: how
    far gold fell from there to the last point, while the reward model's score rose by gained. Gao et al. 2023 call
    that over-optimisation.
    """
    points: list[dict[str, Any]] = []
    for row in rows:
        if "eval/gold_score" in row:  # the reward model is learned from
            scores = row["eval/score"], row["eval/gold_score"]
        elif "eval/reward_score" in row:  # the labeller is learned from
            scores = row["eval/reward_score"], row["eval/score"]
        else:
            continue
        points.append({"step": int(row["step"]), "kl": row.get("eval/kl"), "reward": scores[0], "gold": scores[1]})
    if len(points) < 2:
        return None
    best, last = max(points, key=lambda point: point["gold"]), points[-1]
    return {
        "points": points,
        "best": best,
        "lost": best["gold"] - last["gold"],
        "gained": last["reward"] - best["reward"],
        "correlation": _correlation(points),
    }


def _correlation(points: Sequence[Mapping[str, float]]) -> float | None:
    """Of the two scores along training; two points always lie on a line, and say nothing."""
    if len(points) < 3:
        return None
    return pair_tables.correlation(*(np.array([point[key] for point in points]) for key in ("reward", "gold")))


def section(stages: Iterable[Finished]) -> dict[str, Any] | None:
    """What the report shows: of each split whose pairs somebody labelled, and each training whose replies a gold
    labeller scored. None where there is neither."""
    splits, curves = [], []
    for stage in stages:
        if (stage.folder / artifacts.GAPS).exists() and _labelled(stage.settings):
            splits.append({"name": stage.name} | _split(stage.folder))
        if (found := over_optimisation(metrics.read(stage.folder))) is not None:
            curves.append({"name": stage.name, "drawn": _drawn(found["points"])} | found)
    return {"splits": splits, "curves": curves} if splits or curves else None


def _drawn(points: Sequence[Mapping[str, float]]) -> figures.Drawn:
    """The curve as a picture that stands in the page itself."""
    lines = {
        "reward model": [(point["step"], point["reward"]) for point in points],
        "gold": [(point["step"], point["gold"]) for point in points],
    }
    return figures.lines(lines, "step", "mean score of held-out replies", marker="o")


def _labelled(settings: Mapping[str, Any]) -> bool:
    """Whether a split's gaps are of its scorer, and somebody else chose the better reply of its pairs."""
    others = settings["pair_source"] == "dataset" or bool(settings["labeller"])
    return settings.get("gap", "reward") == "reward" and others


def _split(folder: epath.Path) -> dict[str, Any]:
    gap = artifacts.read_gaps(folder).gap
    confidence = artifacts.read_array(folder / artifacts.PAIR_ROWS / "confidence.npy")
    rows = pair_tables.by_gap_decile(gap)
    share = pair_tables.accuracy(gap)
    return {
        "pairs": len(gap),
        "accuracy": share,
        "standard_error": pair_tables.standard_error(share, len(gap)),
        "deciles": rows,
        "calibration_error": pair_tables.calibration_error(rows),
        "confidence": with_confidence(gap, confidence),
    }
