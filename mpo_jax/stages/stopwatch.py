"""Results of a step's phases enter as they are dispatched; how long each took leaves, and the step waits for nothing.

A device runs programs in the order of their dispatch, so a phase took from the end of the one before to its own. A
thread waits for those ends; whoever reads a number later, as the metrics do one step late, has it then.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from mpo_jax.types import PyTree


class Reading:
    """A number that will be known: `np.asarray` and `jax.device_get` wait for it."""

    def __init__(self, future: Future):
        self._future = future

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._future.result(), dtype or np.float64)


class Stopwatch:
    """Times the phases of steps, one step after another."""

    def __init__(self):
        # One worker: what follows runs in the order of the calls, and the two times are its own.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stopwatch")
        self._began = self._before = 0.0

    def begin(self) -> None:
        """A step begins: with this call, or when the step before it ends, if the device is still busy."""
        self._worker.submit(self._begin, time.perf_counter())

    def lap(self, result: PyTree) -> Reading:
        """Seconds from the end of the phase before until `result`, which nothing may donate, is there."""
        return self._read(self._lap, result)

    def rate(self, count: jax.Array) -> Reading:
        """`count` over the seconds from the step's beginning to its last lap."""
        return self._read(self._rate, count)

    def mean(self, laps: Sequence[Reading]) -> Reading:
        """Of laps that were asked for before."""
        return self._read(lambda laps: float(np.mean([float(np.asarray(lap)) for lap in laps])), laps)

    def _read(self, function: Callable[[PyTree], float], argument: PyTree) -> Reading:
        return Reading(self._worker.submit(function, argument))

    def _begin(self, now: float) -> None:
        self._began = self._before = max(now, self._before)

    def _lap(self, result: PyTree) -> float:
        jax.block_until_ready(result)
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        return seconds

    def _rate(self, count: jax.Array) -> float:
        return float(count) / max(self._before - self._began, 1e-9)
