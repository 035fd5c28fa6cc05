"""Outcomes of paired comparisons enter, a number for each prompt; win rates that say how sure they are leave.

An outcome is 1 where the left policy's reply was preferred, 0 where the right one's was, 0.5 for a tie, or the mean of
several verdicts on the same prompt. Prompts are the unit that is resampled: verdicts on one prompt are not independent.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How often `left` was preferred to `right`, in the eyes of `by`, over `prompts` prompts.

    win_rate: mean outcome, ties counted half. low, high: its 95 % bootstrap interval. p_value: two-sided exact sign
    test against no preference. adjusted_p: the same after Holm's correction over the family; None before.
    length_controlled: the win rate between replies of equal length, None where lengths are not known.
    """

    left: str
    right: str
    by: str
    prompts: int
    win_rate: float
    low: float
    high: float
    p_value: float
    adjusted_p: float | None = None
    length_controlled: float | None = None


JUDGES = (("gold", "the gold labeller"), ("reward", "the reward model"))
"""Scores of a reply that compare policies, and in whose eyes; the first that there is has more weight."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher one policy's replies score than another's on the same prompts: the mean of the paired
    differences, its 95 % t interval, and the two-sided p-value of the paired t test."""

    mean: float
    low: float
    high: float
    p_value: float


def difference(left_scores, right_scores, level: float = 0.95) -> Difference:
    """Of paired scores, [prompts] each. InputError for less than two finite pairs."""
    from scipy import special  # not at the top, where it would be a tenth of a command's start

    left, right = np.asarray(left_scores, np.float64), np.asarray(right_scores, np.float64)
    if left.shape != right.shape or left.size < 2 or not np.all(np.isfinite(left) & np.isfinite(right)):
        raise InputError(
            f"scores of shapes {left.shape} and {right.shape}; expected a finite one of each, of two prompts"
        )
    apart = left - right
    mean, error = float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))
    half = float(special.stdtrit(len(apart) - 1, (1 + level) / 2)) * error
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Difference(mean, mean - half, mean + half, 2 * float(special.stdtr(len(apart) - 1, -abs(mean) / error)))


def standard_error(values: np.ndarray) -> float:
    """Of a mean over prompts."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def outcomes(left_scores, right_scores) -> np.ndarray:
    """f64 [prompts]: 1 where the left score is the higher, 0 where the right one is, 0.5 where they are equal."""
    left, right = np.asarray(left_scores, np.float64), np.asarray(right_scores, np.float64)
    if left.shape != right.shape or not np.all(np.isfinite(left) & np.isfinite(right)):
        raise InputError(f"scores of shapes {left.shape} and {right.shape}; expected a finite one of each per prompt")
    return (1 + np.sign(left - right)) / 2


def compare(
    left: str, right: str, by: str, outcomes, length_difference=None, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """The comparison of two policies. length_difference: [prompts], left's reply less right's, in tokens."""
    won = _checked(outcomes)
    low, high = bootstrap_interval(won, resamples, seed=seed)
    controlled = None if length_difference is None else length_controlled(won, length_difference)
    return Comparison(
        left, right, by, len(won), float(won.mean()), low, high, sign_test(won), length_controlled=controlled
    )


def bootstrap_interval(outcomes, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over resampled prompts, at Hesterberg's expanded level (2015, section 5.3).

    How often each distinct outcome is drawn is multinomial, so that a resample costs one draw for each distinct value.
    The expansion undoes the factor sqrt((n - 1) / n) by which the bootstrap's spread is too small. Outcomes that are
    all equal have no spread to resample: there the interval holds every mean that an unseen share of outcomes, as
    large as the exact binomial bound allows, could lead to.
    """
    won = _checked(outcomes)
    prompts, tail = len(won), (1 - level) / 2
    values, counts = np.unique(won, return_counts=True)
    if len(values) == 1:
        unseen = 1 - tail ** (1 / prompts)
        return float(values[0] * (1 - unseen)), float(values[0] * (1 - unseen) + unseen)
    draws = np.random.default_rng(seed).multinomial(prompts, counts / prompts, size=resamples)
    return percentiles(draws @ values / prompts, prompts, level)


def percentiles(drawn: np.ndarray, prompts: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a figure that was computed of many resamples of so many prompts: see `bootstrap_interval`."""
    from scipy import special

    expanded = special.ndtr(math.sqrt(prompts / (prompts - 1)) * special.stdtrit(prompts - 1, (1 - level) / 2))
    low, high = np.quantile(drawn, [expanded, 1 - expanded])
    return float(low), float(high)


def ratio_interval(
    parts, wholes, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """The interval of sum(parts) / sum(wholes), [prompts] each, resampled over prompts, whose verdicts are not
    independent. None where the whole is 0. Where all prompts' shares are equal, as `bootstrap_interval` has it."""
    table = np.stack([np.asarray(parts, np.float64), np.asarray(wholes, np.float64)], 1)
    table = table[table[:, 1] > 0]
    if not len(table):
        return None
    prompts, shares = len(table), table[:, 0] / table[:, 1]
    if prompts == 1 or np.ptp(shares) == 0:
        return bootstrap_interval(shares[:1].repeat(prompts), resamples, level, seed)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(prompts, counts / prompts, size=resamples) @ kinds
    return percentiles(draws[:, 0] / draws[:, 1], prompts, level)


def sign_test(outcomes) -> float:
    """Two-sided exact p-value of as many prompts won and lost, were either as likely; ties say nothing."""
    from scipy import special

    won = _checked(outcomes)
    wins, losses = int(np.sum(won > 0.5)), int(np.sum(won < 0.5))
    return min(1.0, 2 * float(special.bdtr(min(wins, losses), wins + losses, 0.5)))


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The same comparisons, in their order, with p-values adjusted for their number (Holm 1979)."""
    adjusted = holm_adjusted([comparison.p_value for comparison in comparisons])
    return [dataclasses.replace(comparison, adjusted_p=p) for comparison, p in zip(comparisons, adjusted, strict=True)]


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values, in their order, adjusted for their number (Holm 1979)."""
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given, kind="stable")
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)), 1)
    return adjusted.tolist()


def length_controlled(outcomes, length_difference) -> float:
    """The win rate at no difference in length (AlpacaEval 2, Dubois et al. 2024, equation 2, without its prompt term).

    Logistic regression of the outcome on tanh(difference / its standard deviation), under Firth's penalty (1993), which
    keeps the estimate finite where length alone decides. The win rate is the regression's value at difference 0.
    """
    from scipy import special

    won = _checked(outcomes)
    difference = np.asarray(length_difference, np.float64)
    if difference.shape != won.shape or not np.all(np.isfinite(difference)):
        raise InputError(f"length differences of shape {difference.shape}; expected a finite one for each outcome")
    spread = difference.std()
    columns = [np.ones_like(won)]
    if spread > 0:
        columns.append(np.tanh(difference / spread))
    return float(special.expit(_firth(np.stack(columns, 1), won)[0]))


def sample_size(win_rate: float, level: float = 0.95, power: float = 0.8) -> int:
    """Prompts needed so that a two-sided test at `level` tells a true win rate from one half with this power.

    Fleiss, Statistical Methods for Rates and Proportions, the one-sample case without ties.
    """
    from scipy import special

    if not 0 <= win_rate <= 1 or win_rate == 0.5:
        raise InputError(f"a win rate of {win_rate} is told from one half by no number of prompts; expected 0 to 1")
    null, alternative = 0.5, math.sqrt(win_rate * (1 - win_rate))
    reach = special.ndtri((1 + level) / 2) * null + special.ndtri(power) * alternative
    return math.ceil((reach / (win_rate - 0.5)) ** 2)


def sentence(comparison: Comparison) -> str:
    """'MPO preferred to DPO in 61 % ± 4 of 500 prompts', by whom, and whether that is more than chance."""
    c = comparison
    p = c.p_value if c.adjusted_p is None else c.adjusted_p
    text = f"{c.left} preferred to {c.right} in {_percent(c.win_rate)} % ± {_percent((c.high - c.low) / 2)}"
    text += f" of {c.prompts:,} prompts by {c.by}"
    if c.length_controlled is not None:
        text += f", {_percent(c.length_controlled)} % between replies of equal length"
    text += " (p < 0.001" if p < 0.001 else f" (p = {p:.2g}"
    if p >= 0.05 and c.win_rate != 0.5:
        text += ": not distinguishable from chance; for such a win rate that would need about "
        text += f"{sample_size(c.win_rate):,} prompts"
    return text + ")."


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _checked(outcomes) -> np.ndarray:
    won = np.asarray(outcomes, np.float64)
    if won.ndim != 1 or not len(won) or not np.all((won >= 0) & (won <= 1)):
        raise InputError(f"outcomes of shape {won.shape}; expected at least one, each from 0 (lost) to 1 (won)")
    return won


def _firth(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Coefficients f64 [columns] of the logistic regression whose score is X'(y - p + h (1/2 - p)), h the leverages."""
    from scipy import special

    weights = np.zeros(inputs.shape[1])
    for _ in range(200):
        p = special.expit(inputs @ weights)
        variance = p * (1 - p)
        covariance = np.linalg.inv(inputs.T @ (inputs * variance[:, None]))
        leverage = variance * np.einsum("nd,de,ne->n", inputs, covariance, inputs)
        step = covariance @ (inputs.T @ (targets - p + leverage * (0.5 - p)))
        weights += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))  # long steps overshoot where p is near 0 or 1
        if np.abs(step).max() < 1e-10:
            break
    return weights
