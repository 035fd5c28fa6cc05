"""Texts enter; gold scores and noisy preferences leave: what stands in for the human in self-labelled studies."""

import functools

import numpy as np

from mpo_jax.errors import InputError

LABELLERS = ("vader",)


def score(labeller: str, texts: list[str]) -> np.ndarray:
    """The labeller's score of each text, f32 [texts]. vader: the compound sentiment, from -1 to 1 (Hutto & Gilbert
    2014). InputError for an unknown labeller."""
    if labeller not in LABELLERS:
        raise InputError(f"labeller: {labeller!r}; expected one of {', '.join(LABELLERS)}")
    analyser = _vader()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts], np.float32)


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
