"""Policies' scores and KL along their trainings enter, a number for each prompt; the scores that they have at the same
KL leave, with intervals.

A policy's curve goes through its points in the order of training: the mean KL to the baseline and the mean score of
each snapshot, straight between them. Where a curve meets a KL more than once, the first time counts: a training stopped
there. Intervals are a paired bootstrap over prompts: one draw of prompts gives every point of every curve its means.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mpo_jax.evaluation import statistics

_VALUES = 5
"""KL values of a table, at most."""
_SURELY = 0.975
"""The share of the draws in which a curve must meet a KL to have a score there."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """steps: of each point, in the order of training; 0 where it begins. kl, score: f64 [points,prompts]. final: which
    point is the policy of the table. begins: the other policy whose point the first one is, or ""."""

    steps: Sequence[int]
    kl: np.ndarray
    score: np.ndarray
    final: int
    begins: str = ""


def section(
    curves: Mapping[str, Curve], subject: str, by: str, baseline: str, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """What a report shows of curves over the same prompts, as plain data: their points with standard errors, their
    scores at common KL values, and `subject` against each other policy at the KL of whichever of the two ends nearer to
    the baseline."""
    prompts = next(iter(curves.values())).kl.shape[1]
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
    drawn = {name: (draws @ curve.kl.T, draws @ curve.score.T) for name, curve in curves.items()}
    values = common_values(_span(kl) for kl, _ in drawn.values() if kl.shape[1] > 1)
    return {
        "by": by,
        "baseline": baseline,
        "prompts": prompts,
        "points": {name: _points(curve) for name, curve in curves.items()},
        "values": values,
        "scores": {
            name: [_score(curve, drawn[name], value) for value in values]
            for name, curve in curves.items()
            if len(curve.steps) > 1
        },
        "against": _against(curves, drawn, subject) if subject in curves else [],
    }


def at(kl: np.ndarray, score: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """The score at a KL, f64 [...], between the points of a curve, f64 [...,points]; NaN where it does not meet it."""
    given = np.broadcast_to(np.asarray(value, np.float64), kl.shape[:-1])[..., None]
    left, right = kl[..., :-1], kl[..., 1:]
    inside = (np.minimum(left, right) <= given) & (given <= np.maximum(left, right))
    if not inside.shape[-1]:
        return np.full(kl.shape[:-1], np.nan)
    first = inside.argmax(-1)[..., None]
    k0, k1, s0, s1 = (
        np.take_along_axis(each, first, -1)[..., 0] for each in (left, right, score[..., :-1], score[..., 1:])
    )
    share = np.where(k1 == k0, 0, (given[..., 0] - k0) / np.where(k1 == k0, 1, k1 - k0))
    return np.where(inside.any(-1), s0 + share * (s1 - s0), np.nan)


def common_values(spans: Iterable[tuple[float, float]]) -> list[float]:
    """KL values at which at least two curves have a score, evenly up to the largest that two of them reach, in two
    leading digits. spans: the smallest and the largest KL of each curve."""
    spans = list(spans)
    ends = sorted((high for _, high in spans), reverse=True)
    if len(ends) < 2 or ends[1] <= 0:
        return []
    values = dict.fromkeys(_two_digits(ends[1] * (number + 1) / _VALUES) for number in range(_VALUES))
    return [value for value in values if sum(low <= value <= high for low, high in spans) > 1]


def _span(kl: np.ndarray) -> tuple[float, float]:
    """What a curve surely passes. kl: of its points in every draw, f64 [draws,points]."""
    return float(np.quantile(kl.min(1), _SURELY)), float(np.quantile(kl.max(1), 1 - _SURELY))


def _two_digits(value: float) -> float:
    """Downwards: the value itself may be the end of a curve."""
    place = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.floor(value / place + 1e-9) * place:.2g}")


def _points(curve: Curve) -> list[dict[str, Any]]:
    return [
        {"step": step, "final": place == curve.final, "kl": float(kl.mean()), "kl_error": statistics.standard_error(kl),
         "score": float(score.mean()), "score_error": statistics.standard_error(score)}
        for place, (step, kl, score) in enumerate(zip(curve.steps, curve.kl, curve.score, strict=True))
    ]  # fmt: skip


def _score(curve: Curve, drawn: tuple[np.ndarray, np.ndarray], value: float) -> dict[str, float] | None:
    """The score of a curve at a KL with its interval; None where it does not surely reach it."""
    mean = float(at(curve.kl.mean(1), curve.score.mean(1), value))
    found = at(*drawn, value)
    return _interval(mean, found, curve.kl.shape[1])


def _interval(mean: float, found: np.ndarray, prompts: int) -> dict[str, float] | None:
    found = found[np.isfinite(found)] if np.isfinite(found).mean() >= _SURELY else found[:0]
    if not len(found) or not math.isfinite(mean):
        return None
    low, high = statistics.percentiles(found, prompts)
    return {"mean": mean, "low": low, "high": high}


def _against(
    curves: Mapping[str, Curve], drawn: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str
) -> list[dict[str, Any]]:
    """An entry for each other policy: at which KL, whose end that is, and the difference of score with its interval and
    corrected p-value; "difference" is None where the longer curve does not surely reach that KL, or begins there."""
    own = curves[name]
    rows: list[dict[str, Any]] = []
    for other, curve in curves.items():
        if other == name:
            continue
        nearer = other if curve.kl[curve.final].mean() <= own.kl[own.final].mean() else name
        near, far = (curve, own) if nearer == other else (own, curve)
        (near_kl, near_score), (far_kl, far_score) = (
            drawn[each] for each in ((other, name) if nearer == other else (name, other))
        )
        sign = 1 if nearer == other else -1
        value = float(near.kl[near.final].mean())
        mean = sign * float(at(far.kl.mean(1), far.score.mean(1), value) - near.score[near.final].mean())
        apart = sign * (at(far_kl, far_score, near_kl[:, near.final]) - near_score[:, near.final])
        made = None if far.begins == nearer else _interval(mean, apart, own.kl.shape[1])
        if made is not None:
            made["p_value"] = _p_value(apart[np.isfinite(apart)])
        rows.append({"name": other, "kl": value, "ends": nearer, "begins": far.begins == nearer, "difference": made})
    told: list[dict[str, float]] = [row["difference"] for row in rows if row["difference"] is not None]
    for each, p in zip(told, statistics.holm_adjusted([each["p_value"] for each in told]), strict=True):
        each["adjusted_p"] = p
    return rows


def _p_value(apart: np.ndarray) -> float:
    """Two-sided, of no difference, by the share of draws on either side of it (Davison and Hinkley 1997, section 4.4:
    one is added to both counts, so that it is never 0)."""
    below, above = int(np.sum(apart <= 0)), int(np.sum(apart >= 0))
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(apart)))
