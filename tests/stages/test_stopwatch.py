"""Results that end when a made-up clock says so enter; laps and rates are held against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.stages import stopwatch
from mpo_jax.stages.stopwatch import Stopwatch


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    # A "result" is the time at which the device has it.
    monkeypatch.setattr(stopwatch.jax, "block_until_ready", lambda end: setattr(clock, "now", max(clock.now, end)))
    return clock


def test_laps_end_when_their_results_do(clock):
    watch = Stopwatch()
    clock.now = 10.0
    watch.begin()
    laps = [watch.lap(end) for end in (13.0, 14.0, 18.0)]
    rate = watch.rate(np.float32(24))
    assert float(np.asarray(watch.mean(laps))) == 8 / 3
    assert [float(np.asarray(lap)) for lap in laps] == [3.0, 1.0, 4.0]
    assert float(np.asarray(rate)) == 3.0
    # Dispatched while the device was busy: it began when the step before ended. Dispatched later: with the dispatch.
    clock.now = 17.0
    watch.begin()
    assert float(np.asarray(watch.lap(20.0))) == 2.0
    clock.now = 30.0
    watch.begin()
    assert float(np.asarray(watch.lap(31.0))) == 1.0


def test_readings_are_read_with_arrays_and_hand_over_errors():
    watch = Stopwatch()
    watch.begin()
    found = jax.device_get({"seconds": watch.lap(jnp.ones(3)), "loss": jnp.float32(1)})
    assert float(found["seconds"]) >= 0
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        jax.device_get(watch.lap(gone))
