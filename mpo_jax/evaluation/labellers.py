"""Texts enter; gold scores and noisy preferences leave: what stands in for the human in self-labelled studies."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from mpo_jax.errors import InputError

Labeller = Callable[[Sequence[str]], Sequence[float]]
"""Replies -> a score of each, higher for the better."""


def score(labeller: str, texts: Sequence[str]) -> np.ndarray:
    """The labeller's score of each text, f32 [texts]. InputError for an unknown labeller, and for one that gives
    another number of scores, or one that is not finite."""
    if labeller not in LABELLERS:
        raise InputError(f"labeller: {labeller!r}; expected one of {', '.join(LABELLERS)}")
    found = np.array(LABELLERS[labeller](texts), np.float32)
    if found.shape != (len(texts),) or not np.isfinite(found).all():
        raise InputError(
            f"labeller {labeller!r}: {found.shape} scores of {len(texts)} texts; expected a finite one each"
        )
    return found


def vader(texts: Sequence[str]) -> list[float]:
    """The compound sentiment, from -1 to 1 (Hutto & Gilbert 2014)."""
    analyser = _vader()
    return [analyser.polarity_scores(text)["compound"] for text in texts]


LABELLERS: dict[str, Labeller] = {"vader": vader}
"""By name; a plugin may add its own (docs/architecture.md)."""


@functools.cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def first_wins(left: np.ndarray, right: np.ndarray, temperature: float, ids: np.ndarray, seed: int) -> np.ndarray:
    """Bradley-Terry choices, bool [pairs]: the first wins with probability sigmoid((left - right) / temperature).

    The draw depends on (seed, id) alone. Temperature 0: the higher score always wins, the first on a tie.
    """
    if temperature < 0:
        raise InputError(f"label_temperature: {temperature}; expected 0 or more")
    if temperature == 0:
        return np.asarray(left) >= right
    gap = np.clip((np.asarray(left, np.float64) - right) / temperature, -700, 700)
    draws = [np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64))).random() for number in ids]
    return np.array(draws) < 1 / (1 + np.exp(-gap))
