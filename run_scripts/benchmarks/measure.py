"""A piece of work enters; its seconds, memory, compile time and compiles after warm-up leave."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from mpo_jax import metrics
from run_scripts.benchmarks import kernels
from run_scripts.benchmarks.programs import Work
from run_scripts.benchmarks.recorder import COMPILE

MIB = 1 << 20


class CompileClock:
    """Seconds that XLA has compiled since this was made."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_) -> None:
        self.seconds += duration_secs if event == COMPILE else 0.0


def work(make: Callable[[], Work], runs: int, warm: int = 2, traced: bool = False) -> dict[str, Any]:
    """Medians over `runs` units of work after `warm` untimed ones. best: seconds of one unit, the peers' name for it.

    peak_rss_MiB: of the process, from the end of the first unit on. device_peak_MiB: of a GPU's
    memory, from the start of the process on; None elsewhere. temporaries_MiB: of each program, as XLA says.
    """
    clock = CompileClock()
    metrics.compiles()
    began = time.perf_counter()
    subject = make()
    built = time.perf_counter() - began
    before = clock.seconds
    first = seconds(subject.once)
    compile_seconds = clock.seconds - before
    reset_peak()
    for _ in range(warm - 1):
        subject.once()
    compiled = metrics.compiles()
    samples = [seconds(subject.once) for _ in range(runs)]
    late = metrics.compiles() - compiled
    peak = peak_rss()
    device_peak = device_memory("peak_bytes_in_use")
    best = statistics.median(samples)
    trace = {"kernels": kernels.measured(subject.once)} if traced else {}
    return {
        "best": best,
        "tokens_per_second": subject.tokens / best,
        "peak_rss_MiB": peak,
        "device_peak_MiB": device_peak,
        "planned_MiB": None if subject.planned is None else subject.planned / MIB,
        "compile_seconds": compile_seconds,
        "build_seconds": built,
        "first_seconds": first,
        "compiles_after_warmup": late,
        "temporaries_MiB": {name: temporaries(*program) / MIB for name, program in subject.programs.items()},
        "samples": samples,
        "load_average": os.getloadavg()[0],
    } | trace


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def temporaries(function, arguments: tuple) -> int:
    """Bytes that XLA sets aside for a program beside its arguments and results."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def device_memory(name: str) -> float | None:
    """MiB of one of a device's own memory statistics; None where it keeps none (CPUs)."""
    found = (jax.local_devices()[0].memory_stats() or {}).get(name)
    return None if found is None else found / MIB


def reset_peak() -> None:
    """Peak memory counts from here on (Linux); elsewhere it counts from the start of the process."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_rss() -> float:
    """The process's largest resident set, MiB; NaN where there is no /proc."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return float("nan")
    return int(lines["VmHWM"].split()[0]) / 1024
