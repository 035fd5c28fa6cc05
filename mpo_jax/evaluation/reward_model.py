"""A finished reward model enters; what its scores are worth on held-out pairs leaves: calibration, accuracy by the size
of the gap, and what a reply's length alone would tell."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_jax.evaluation import figures, verdict
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation.sections import Finished

MISCALIBRATED, NOISE = 0.05, 0.01
"""Calibration error, and the chance of such distances from a calibrated model, at which one is said to be wrong."""


def section(stage: Finished) -> dict[str, Any] | None:
    """What the report shows of a reward model; None where the stage, an earlier version's, left no report."""
    report = (stage.manifest["summary"] or {}).get("report")
    if report is None:
        return None
    told = report.get("calibration", [])
    bins = [intervals(row, "predicted", "observed") for row in told]
    deciles = [intervals(row | {"size": (row["from"] + row["to"]) / 2}, "size", "accuracy")
               for row in report.get("by_gap_decile", [])]  # fmt: skip
    known, length = report.get("baselines", {}), report.get("score_length_correlation")
    return {
        "name": stage.name,
        "pairs": report["pairs"],
        "accuracy": verdict.with_error(report["accuracy"], report["accuracy_se"]),
        "trained": report.get("training_accuracy"),
        "longer": 1 - known["shorter_wins"] if "shorter_wins" in known else None,
        "words": known.get("tfidf_bradley_terry"),
        "digits": verdict.decimals(report["accuracy_se"]),
        "length": None if length is None else correlated(length, report["pairs"]),
        "calibration_error": pair_tables.calibration_error(told, "observed") if told else None,
        "noise": calibration_noise(told) if told else None,
        "calibration": bins,
        "deciles": deciles,
        "figures": [*_reliability(bins), *_by_gap(deciles)],
    }


def intervals(row: Mapping[str, float], x: str, share: str) -> dict[str, float]:
    """A row with its share's 95 % interval, as `figures.shares` draws it. x, share: names of its values."""
    low, high = pair_tables.wilson(row[share], row["pairs"])
    return dict(row) | {"x": row[x], "share": row[share], "low": low, "high": high}


def correlated(value: float, pairs: int) -> str:
    """A correlation with its standard error. pairs: two replies of one pair are not independent, so they count once."""
    return verdict.with_error(value, (1 - value**2) / math.sqrt(max(pairs - 3, 1)))


def calibration_noise(rows: Sequence[Mapping[str, float]]) -> float:
    """The calibration error that a perfectly calibrated model would show on so many pairs, by chance: the mean distance
    of a binomial share from its probability, which the normal law gives as sqrt(2 / pi) standard errors."""
    pairs = sum(row["pairs"] for row in rows)
    distance = (pair_tables.standard_error(row["predicted"], int(row["pairs"])) for row in rows)
    return math.sqrt(2 / math.pi) * sum(row["pairs"] * each for row, each in zip(rows, distance, strict=True)) / pairs


def miscalibrated(rows: Sequence[Mapping[str, float]]) -> bool:
    """Whether predicted and observed agreement lie further apart than chance explains, by a chi-squared test over the
    bins (Hosmer and Lemeshow 1980, without estimated parameters), and far enough apart to matter."""
    if not rows or pair_tables.calibration_error(rows, "observed") < MISCALIBRATED:
        return False
    from scipy import stats  # see `validation.with_confidence`

    variance = (max(row["predicted"] * (1 - row["predicted"]), 1e-6) / row["pairs"] for row in rows)
    distance = ((row["observed"] - row["predicted"]) ** 2 for row in rows)
    found = sum(far / noise for far, noise in zip(distance, variance, strict=True))
    return bool(stats.chi2.sf(found, len(rows)) < NOISE)


def _reliability(rows: Sequence[Mapping[str, float]]) -> list[figures.Drawn]:
    if not rows:
        return []
    xlabel, ylabel = "predicted probability of the surer side", "share in which it is preferred"
    return [figures.shares(rows, [(0.5, 0.5), (1.0, 1.0)], xlabel, ylabel, "perfect calibration", "reliability")]


def _by_gap(rows: Sequence[Mapping[str, float]]) -> list[figures.Drawn]:
    if not rows:
        return []
    expected = [(row["x"], row["predicted"]) for row in rows]
    return [
        figures.shares(
            rows, expected, "size of the gap, reward units", "accuracy", "predicted by the gap", "accuracy by gap"
        )
    ]
