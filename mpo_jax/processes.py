"""A run's process, one of several, enters; it joins the others, and waits for them where they must meet.

Waiting has an end: where a process has died or hangs, the others stop with an error that names the place.
"""

import itertools
import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from mpo_jax.errors import InputError, Stopped
from mpo_jax.types import PyTree

BARRIER_SECONDS = 1800
"""How long a process waits for the others: longer than the slowest host's export or compile."""

HEARTBEAT_SECONDS = 300
"""How long JAX waits for a sign of life before it aborts all processes; `peers` finds a dead one before that."""

_numbers = itertools.count()


def start(coordinator: str | None, processes: int | None, process: int | None, detect: bool) -> None:
    """Joins the processes of a run: by host:port of process 0, their number and this one's index, or, with `detect`,
    by what the platform tells (Cloud TPU, GKE, SLURM, MPI). Alone, where neither is given."""
    if (devices := _virtual_devices()) > 1:
        spare_threads(devices)
    if coordinator is None and not detect:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `stopping`
    if coordinator is not None and (processes is None or process is None):
        raise InputError("--coordinator: give --processes and --process with it")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed: {' '.join(str(error).split())[:300]}; or give --coordinator") from error


def spare_threads(devices: int) -> None:
    """Gives XLA three threads for each of so many devices on one CPU, before it begins.

    The devices' parts of a program wait for each other in its threads, of which there are as many as devices or
    processors: one that something else holds, and all have been seen to wait for ever."""
    os.environ.setdefault("PJRT_NPROC", str(3 * devices))


def _virtual_devices() -> int:
    """How many devices this process was told to have on its CPU."""
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(getattr(jax.config, "jax_num_cpu_devices", 1), int(flag[1]) if flag else 1)


def together(work: Callable[[], Any], what: str = "") -> None:
    """Does some work on every process; all raise InputError, or Stopped, where one does, and none waits for one that
    has ended. what: of long work, for which the others wait at a barrier of that name."""
    told, stopped = "", None
    try:
        work()
    except InputError as error:
        told = str(error)
    except Stopped as error:
        stopped = error
    if jax.process_count() > 1:
        if what:  # a collective operation waits for less long
            barrier(what)
        code = -1 if told else int(stopped.code or 0) if stopped else 0
        codes = multihost_utils.process_allgather(np.array(code, np.int32))
        failed = np.flatnonzero(codes < 0)
        told = told or (f"process {failed[0]} ended with an error; see its log" if len(failed) else "")
        stopped = stopped or (Stopped(int(codes.max())) if codes.max() > 0 else None)
    if told:
        raise InputError(told)
    if stopped is not None:
        raise stopped


def first(work: Callable[[], Any], what: str = "") -> None:
    """`together` of what process 0 alone has to do."""
    together(work if jax.process_index() == 0 else lambda: None, what)


def from_first(work: Callable[[], np.ndarray], shape: tuple[int, ...], what: str) -> np.ndarray:
    """What some work gives on process 0, which does it alone, on every process: f32 of the shape. As in `first`, all
    raise InputError where it does; the others wait for it at a barrier that is named `what`."""
    found: list[np.ndarray] = []
    first(lambda: found.append(np.asarray(work(), np.float32)), what)
    if jax.process_count() == 1:
        return found[0]
    return np.asarray(multihost_utils.broadcast_one_to_all(found[0] if found else np.zeros(shape, np.float32)))


def told(work: Callable[[], Any], what: str) -> Any:
    """The JSON value that some work gives on process 0, which does it alone, on every process; see `from_first`."""
    return json.loads(told_by_first(lambda: json.dumps(work()).encode(), what))


def told_by_first(work: Callable[[], bytes], what: str = "") -> bytes:
    """What some work gives on process 0, which does it alone, on every process; see `first`."""
    found: list[bytes] = []
    first(lambda: found.append(work()), what)
    if jax.process_count() == 1:
        return found[0]
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(found[0]) if found else 0)))
    content = np.frombuffer(found[0], np.uint8) if found else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes()


def on_host(tree: PyTree) -> PyTree:
    """A tree's arrays as NumPy, whole on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def barrier(what: str, seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process is here. RuntimeError, naming `what`, where one is not after `seconds`."""
    if jax.process_count() == 1:
        return
    name = f"{what} {next(_numbers)}"  # a barrier's name is used once; every process counts alike
    client: Any = distributed.global_state.client
    try:
        client.wait_at_barrier(name, timeout_in_ms=int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"process {jax.process_index()} waited {seconds:.0f} s at {what!r} for the others: one died or hangs; see "
            "its log, then run the same command again"
        ) from error
