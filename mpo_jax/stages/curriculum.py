"""The gaps of pairs enter; how much each pair counts, and the order in which they are learned, leave.

gap f32 [pairs] is chosen's score minus rejected's, in the units of the split; pairs that the scorer calls mislabelled
have one below 0, and come last among the easy.
"""

from collections.abc import Callable

import numpy as np


def by_size(gap: np.ndarray) -> np.ndarray:
    """f32 [pairs]: the gap itself; pairs whose gap is below 0 count nothing."""
    return np.maximum(gap, 0).astype(np.float32)


def by_chance(gap: np.ndarray) -> np.ndarray:
    """f32 [pairs]: sigmoid(gap), under a Bradley-Terry reward model the probability that chosen is better."""
    return (0.5 * (1 + np.tanh(0.5 * gap.astype(np.float64)))).astype(np.float32)


def easy_first(gap: np.ndarray) -> np.ndarray:
    """i64 [pairs]: rows from the largest gap to the smallest. Curri-DPO (Pattnaik et al. 2024, arXiv 2403.07230)."""
    return np.argsort(-gap, kind="stable")


def hard_first(gap: np.ndarray) -> np.ndarray:
    """i64 [pairs]: rows from the smallest gap to the largest."""
    return np.argsort(gap, kind="stable")


WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {"none": None, "gap": by_size, "sigmoid": by_chance}
"""None: all count alike. The loss of a batch is the mean by these weights, so that only their ratios matter."""

ORDERS: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "random": None, "easy_first": easy_first, "hard_first": hard_first,
}  # fmt: skip
"""None: drawn anew in every epoch."""
