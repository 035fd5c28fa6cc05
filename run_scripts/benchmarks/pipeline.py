"""A run's flags enter; what each stage of the quickstart takes with them leaves: with an empty compilation cache, and
with the one that this leaves behind.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_jax import artifacts, metrics
from mpo_jax.artifacts import COMPILED
from run_scripts.benchmarks import paths
from run_scripts.benchmarks.paths import QUICKSTART, ROOT

CACHES = {"cold": "an empty compilation cache", "warm": "the compilation cache that the run before left"}
_RECORDER = [sys.executable, "-m", "run_scripts.benchmarks.recorder"]
_AMOUNTS = ("seconds", "cpu_seconds", "compile_seconds", "trace_seconds", "programs", "found")


def run(flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs the quickstart twice in a workdir in `folder`, the second time when it holds its compiled programs alone.
    flags: of the run, beside its workdir.

    "cold", "warm" -> "stages" (name -> what `recorder.Recorder.between` tells, with idle and, of a training,
    tokens_per_second), "rest" (start, checks and report), "whole", the seconds from outside the process, and the
    machine's load_average at the end. idle: share of the processors' time that the run did not use, whoever else did.
    """
    workdir, processors = folder / "run", _processors()
    found: dict[str, Any] = {
        "processor": _processor(),
        "processors": processors,
        "flags": list(flags),
    }
    for cache in CACHES:
        paths.empty(workdir, kept=COMPILED)
        found[cache] = _once(workdir, flags, processors) | {"load_average": os.getloadavg()[0]}
    return found


def _once(workdir: Path, flags: Sequence[str], processors: int) -> dict[str, Any]:
    target, log = workdir.parent / "recorded.json", workdir.parent / "log"
    command = [*_RECORDER, str(target), *QUICKSTART, *flags, f"--workdir={workdir}"]
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}  # or none is cold
    before, began = paths.cpu_of_children(), time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT).returncode
    took = {"seconds": time.perf_counter() - began, "cpu_seconds": paths.cpu_of_children() - before}
    if code:
        sys.exit(f"error: the run ended with exit code {code}; its last words: {log.read_text()[-500:]}")
    recorded = json.loads(target.read_text())
    stages, whole = recorded["stages"], recorded["whole"] | took
    folders = artifacts.stage_folders(workdir)
    for name, stage in stages.items():
        stage["tokens_per_second"] = tokens_per_second(metrics.read(folders[name]))
    rest = {name: whole[name] - sum(stage[name] for stage in stages.values()) for name in _AMOUNTS}
    for each in (*stages.values(), rest, whole):
        each["idle"] = 1 - each["cpu_seconds"] / (each["seconds"] * processors)
    return {"stages": stages, "rest": rest, "whole": whole}


def tokens_per_second(rows: Iterable[Mapping[str, float]]) -> float | None:
    """Of the steps of a training, by its metrics: real tokens of its rows or, in PPO, of the replies, over the steps'
    own seconds. Steps that compile have none and are left out, as are evaluations and saving. None of a stage that
    logs no steps."""
    steps = [row for row in rows if "seconds" in row]
    if any("response_tokens" in row for row in steps):
        parts = [(row["response_tokens"], row["response_tokens"] / row["tokens_per_second"]) for row in steps]
    else:
        parts = [(row["tokens"], row["seconds"]) for row in steps]
    seconds = sum(took for _, took in parts)
    return sum(tokens for tokens, _ in parts) / seconds if seconds else None


HEAD = (
    "| stage | seconds | CPU seconds | compile | trace | both, share | programs, from the cache | tokens/s | idle |\n"
    "| --- |" + " ---: |" * 8
)


def table(found: Mapping[str, Any]) -> str:
    """For people: a table for each cache."""
    shown = []
    for cache, words in CACHES.items():
        rows = found[cache]["stages"] | {"rest": found[cache]["rest"], "whole": found[cache]["whole"]}
        shown += [f"With {words}:", "", HEAD, *(_line(name, row) for name, row in rows.items()), ""]
    return "\n".join(shown)


def _line(name: str, row: Mapping[str, Any]) -> str:
    share = (row["compile_seconds"] + row["trace_seconds"]) / row["seconds"]
    seconds = " | ".join(f"{row[each]:.1f}" for each in ("seconds", "cpu_seconds", "compile_seconds", "trace_seconds"))
    rate = row.get("tokens_per_second")
    rate = "" if rate is None else f"{rate:,.0f}"
    return f"| {name} | {seconds} | {share:.0%} | {row['programs']}, {row['found']} | {rate} | {row['idle']:.0%} |"


def _processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Its name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
