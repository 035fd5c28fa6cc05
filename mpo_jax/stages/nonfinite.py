"""The metrics of every step enter, on the device; the first step whose loss or gradient is not finite leaves.

Each step is looked at by the device; the host reads what was found where it waits anyway: where it logs, evaluates and
saves. So a step that went wrong is never saved, however seldom the loop logs.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.data.loader import Loader
from mpo_jax.types import PyTree, record

CHOICES = ("stop", "skip")
"""What a stage does about a step that is not finite: stops, or takes no update from its batch and goes on."""

MOST_IN_A_ROW = 10
"""Skipped steps one after the other, after which a stage stops too: then it is not the batch."""

_WATCHED = ("score", "loss", "grad_norm")


class NonFinite(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message names the step and the batch's ids."""


@record
class _Seen:
    """step: i32 [], the first that was not finite (0: none). values: f32 [watched], its. count, in_a_row, longest: i32
    [], steps that were not finite in all, up to now, and one after the other."""

    step: jax.Array | np.ndarray
    values: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
    in_a_row: jax.Array | np.ndarray
    longest: jax.Array | np.ndarray


class Watch:
    """What is known of a stage's steps. skip: as the stage's `on_nonfinite`. skipped: steps skipped before a resume."""

    def __init__(self, loader: Loader, skip: bool, skipped: int = 0):
        self._loader, self._skip, self._skipped_before = loader, skip, skipped
        self._names: tuple[str, ...] = ()
        self._now: _Seen | None = None
        self._before: _Seen | None = None

    def look(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Looks at the metrics of the step that ends at `done`, without waiting for it."""
        self._names = tuple(name for name in _WATCHED if name in metrics)
        values = [metrics[name] for name in self._names]
        zero = np.zeros((), np.int32)
        seen = self._now or _Seen(zero, np.zeros(len(values), np.float32), zero, zero, zero)
        self._before, self._now = self._now, _look(seen, done, values)

    def check(self, saved: int | None, behind: bool = False) -> None:
        """NonFinite if a step so far was not finite and is not to be skipped. behind: all but the last step, which may
        be on its way still. saved: the step to resume from, None where there is none."""
        seen = self._before if behind else self._now
        if seen is None:
            return
        seen = jax.device_get(seen)
        if not int(seen.step) or (self._skip and int(seen.longest) < MOST_IN_A_ROW):
            return
        step = int(seen.step)
        values = zip(self._names, seen.values.tolist(), strict=True)
        name, value = next((name, value) for name, value in values if not math.isfinite(value))
        _, rows = self._loader.rows(step - 1)
        ids = self._loader.encoded.id[rows[rows >= 0]].tolist()
        way = "on_nonfinite=skip skips such batches"
        if self._skip:
            way = f"{int(seen.longest)} steps in a row were skipped, so this batch is not the only cause"
        start = "from the beginning" if saved is None else f"after step {saved}, the last checkpoint"
        raise NonFinite(f"step {step}: {name} is {value}; batch ids {ids}; run again to go on {start}; {way}")

    @property
    def skipped(self) -> int:
        """Steps that took no update; waits for the last one."""
        return self._skipped_before + (0 if self._now is None else int(jax.device_get(self._now.count)))


@jax.jit
def _look(seen: _Seen, done: int, values: list[jax.Array]) -> _Seen:
    found = jnp.stack([jnp.asarray(value, jnp.float32) for value in values])
    bad = ~jnp.isfinite(found).all()
    first = bad & (seen.step == 0)
    in_a_row = jnp.where(bad, seen.in_a_row + 1, 0)
    return _Seen(
        step=jnp.where(first, done, seen.step),
        values=jnp.where(first, found, seen.values),
        count=seen.count + bad,
        in_a_row=in_a_row,
        longest=jnp.maximum(seen.longest, in_a_row),
    )


def finite(*values: jax.Array) -> jax.Array:
    """bool []: whether all of them are."""
    return jnp.isfinite(jnp.stack(values)).all()


def kept_where(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new tree where `ok`, else the old one: a skipped step leaves parameters and optimizer as they were."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
