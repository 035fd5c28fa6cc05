"""Scores of two replies enter; noisy preferences leave, as people's are."""

import numpy as np

from mpo_jax.errors import InputError


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
