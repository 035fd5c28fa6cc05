"""A run's flags enter; it runs as `python -m mpo_jax.main` runs it, and what each of its stages took leaves, as JSON.

`python -m run_scripts.benchmarks.recorder FILE --config=... --workdir=...`
"""

import functools
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mpo_jax import allocator

COMPILE = "/jax/core/compile/backend_compile_duration"
"""Also of a program that is found in the cache: then of reading it."""
PREPARE = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
FOUND = "/jax/compilation_cache/cache_hits"

Span = tuple[float, float]
"""From when to when, in seconds of one clock."""


class Instant(NamedTuple):
    """clock: seconds. cpu: seconds of all processors together, that this process and its children have used."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> "Instant":
        return cls(time.perf_counter(), sum(os.times()[:4]))


class Recorder:
    """What JAX tells of its compiling, from when this was made; in whatever thread it compiles."""

    def __init__(self):
        import jax

        self.began = Instant.now()
        self.compiling: list[Span] = []
        self.preparing: list[Span] = []
        self.found: list[float] = []
        self.stages: dict[str, dict[str, Any]] = {}
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def _took(self, event: str, duration: float, **_) -> None:
        end = time.perf_counter()
        if event == COMPILE:
            self.compiling.append((end - duration, end))
        elif event in PREPARE:
            self.preparing.append((end - duration, end))

    def _happened(self, event: str, **_) -> None:
        if event == FOUND:
            self.found.append(time.perf_counter())

    def between(self, began: Instant, ended: Instant) -> dict[str, Any]:
        """seconds, and cpu_seconds of all processors. compile_seconds: of those, in which a program was compiled or
        read from the cache. trace_seconds: in which Python traced and lowered one, and none was compiled. programs:
        that were compiled or read; found: those that were read."""
        within = (began.clock, ended.clock)
        compiling = covered(self.compiling, within)
        return {
            "seconds": ended.clock - began.clock,
            "cpu_seconds": ended.cpu - began.cpu,
            "compile_seconds": compiling,
            "trace_seconds": covered([*self.compiling, *self.preparing], within) - compiling,
            "programs": sum(began.clock < end <= ended.clock for _, end in self.compiling),
            "found": sum(began.clock < at <= ended.clock for at in self.found),
        }


def covered(spans: Iterable[Span], within: Span) -> float:
    """Seconds of `within` that at least one of the spans covers: they overlap where programs are traced inside of
    others, or compiled in several threads."""
    total, upto = 0.0, within[0]
    for begin, end in sorted(spans):
        begin, end = max(begin, upto), min(end, within[1])
        if end > begin:
            total, upto = total + end - begin, end
    return total


def main() -> None:
    allocator.restart()
    target = Path(sys.argv.pop(1))
    recorder = Recorder()
    from mpo_jax import main as command
    from mpo_jax import pipeline

    run_stage = pipeline.run_stage

    @functools.wraps(run_stage)
    def recorded(job, *others):
        began = Instant.now()
        run_stage(job, *others)
        recorder.stages[job.name] = recorder.between(began, Instant.now())

    pipeline.run_stage = recorded
    try:
        command.run()
    finally:
        whole = recorder.between(recorder.began, Instant.now())
        target.write_text(json.dumps({"stages": recorder.stages, "whole": whole}))


if __name__ == "__main__":
    main()
