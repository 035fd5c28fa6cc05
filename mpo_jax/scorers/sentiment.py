"""Replies enter; VADER's sentiment of each leaves: what stands in for the human in self-labelled studies."""

import functools
from collections.abc import Sequence


def vader(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """The compound sentiment, from -1 to 1 (Hutto & Gilbert 2014)."""
    analyser = _vader()
    return [analyser.polarity_scores(reply)["compound"] for reply in replies]


@functools.cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
