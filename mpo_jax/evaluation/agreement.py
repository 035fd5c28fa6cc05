"""What several judges said of the same replies enters; how far they agree leaves: Krippendorff's alpha, its interval.

A judge may be a person, a model that is asked, or a scorer. Verdicts are outcomes: 1 where the left policy's reply was
preferred, 0 where the right one's was, 0.5 for a tie; half-way outcomes of several people stand between.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_jax.evaluation import statistics
from mpo_jax.evaluation.judge_prompts import FIRST, SECOND

Key = tuple[str, str, int]
"""Left policy, right policy, prompt: what a verdict is on."""
_LEAST = 2
"""Units that two or more judges must share before their agreement is a number."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha: 1 perfect agreement, 0 that of chance, below 0 worse. low, high: its 95 % bootstrap
    interval over prompts. units: what two or more judges have judged. same: the share of pairs of verdicts that are the
    same."""

    alpha: float
    low: float
    high: float
    units: int
    same: float


def alpha(table, prompts: Sequence[Any], resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Agreement | None:
    """Of ordinal verdicts f64 [judges, units], NaN where a judge said nothing. prompts: [units], of each unit; units on
    one prompt are resampled together.

    None where no two judges share `_LEAST` units, or nobody ever differs in what they choose: chance is not defined
    then. Krippendorff, Content Analysis (2004), section 11.3 to 11.4; ordinal metric. Where all agree there is nothing
    to resample: the lower bound is what alpha would be if as large a share of the prompts as the exact binomial bound
    allows had been disagreed on most strongly.
    """
    given = np.asarray(table, np.float64)
    shared = np.isfinite(given).sum(axis=0) >= 2
    given, place = given[:, shared], np.asarray(prompts)[shared]
    values = np.unique(given[np.isfinite(given)])
    if given.shape[1] < _LEAST or len(values) < 2:
        return None
    pairs = _coincidences(given, values)
    owners = np.unique(place, return_inverse=True)[1]
    by_prompt = np.zeros((owners.max() + 1, len(values), len(values)))
    np.add.at(by_prompt, owners, pairs)
    whole = by_prompt.sum(axis=0)
    found, worst = float(_alpha(whole)), 1 - float(_alpha(whole, worst=True))
    count, tail = len(by_prompt), (1 - level) / 2
    kinds, counts = np.unique(by_prompt.reshape(count, -1), axis=0, return_counts=True)
    low = high = found
    if found == 1 or count == 1:
        low = 1 - worst * (1 - tail ** (1 / count))
    else:
        draws = np.random.default_rng(seed).multinomial(count, counts / count, size=resamples)
        resampled = _alpha((draws @ kinds).reshape(resamples, len(values), len(values)))
        low, high = statistics.percentiles(resampled[np.isfinite(resampled)], count, level)
    return Agreement(found, low, high, given.shape[1], float(np.trace(whole) / whole.sum()))


def _coincidences(given: np.ndarray, values: np.ndarray) -> np.ndarray:
    """f64 [units, values, values]: how often each two values meet in a unit, over all ordered pairs of its judges, each
    judge's verdict counting once."""
    counts = (given[:, :, None] == values).sum(axis=0).astype(np.float64)  # [units, values]
    pairs = counts[:, :, None] * counts[:, None, :]
    pairs[:, np.arange(len(values)), np.arange(len(values))] -= counts
    return pairs / (counts.sum(axis=1) - 1)[:, None, None]


def _alpha(pairs: np.ndarray, worst: bool = False) -> np.ndarray:
    """Of coincidences f64 [..., values, values]; NaN where chance expects no disagreement. worst: if every pair had
    been as far apart as two values can be."""
    totals = pairs.sum(axis=-1)
    before = np.cumsum(totals, axis=-1) - totals / 2  # the middle of each value's ranks
    distance = (before[..., :, None] - before[..., None, :]) ** 2
    count = totals.sum(axis=-1)
    observed = distance.max(axis=(-1, -2)) * count if worst else (pairs * distance).sum(axis=(-1, -2))
    expected = (totals[..., :, None] * totals[..., None, :] * distance).sum(axis=(-1, -2)) / (count - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)


def of_lines(lines: Sequence[Mapping[str, Any]]) -> dict[Key, float]:
    """The outcomes of a verdicts.jsonl, where both orders were read: disagreement between them is a tie."""
    better: dict[Key, list[float]] = {}
    for line in lines:
        if line["verdict"] is not None:
            shown_first = line["first"] == line["left"]
            won = {FIRST: float(shown_first), SECOND: float(not shown_first)}.get(line["verdict"], 0.5)
            better.setdefault((line["left"], line["right"], line["prompt_id"]), []).append(won)
    found = {key: {2.0: 1.0, 0.0: 0.0}.get(sum(both), 0.5) for key, both in better.items() if len(both) == 2}
    return dict(turned(key, outcome) for key, outcome in found.items())


def turned(key: Key, outcome: float) -> tuple[Key, float]:
    """The same verdict with the policies in one order, however a judge's table names them."""
    left, right, prompt = key
    return (key, outcome) if left < right else ((right, left, prompt), 1 - outcome)


def between(judges: Mapping[str, Mapping[Key, float]]) -> list[dict[str, Any]]:
    """How far each two judges agree, on what both have judged; those that share nothing are left out."""
    found = []
    for one, other in itertools.combinations(judges, 2):
        keys = sorted(judges[one].keys() & judges[other].keys())
        table = [[judges[name][key] for key in keys] for name in (one, other)]
        agreed = alpha(np.array(table).reshape(2, len(keys)), [prompt for _, _, prompt in keys])
        if agreed is not None:
            found.append({"one": one, "other": other} | dataclasses.asdict(agreed))
    return found
