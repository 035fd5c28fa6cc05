"""A run's process, one of several, enters; it joins the others, and waits for them where they must meet.

Waiting has an end: where a process has died or hangs, the others stop with an error that names the place.
"""

import itertools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from mpo_jax.errors import InputError
from mpo_jax.types import PyTree

BARRIER_SECONDS = 1800
"""How long a process waits for the others: longer than the slowest host's export or compile."""

_numbers = itertools.count()


def start(coordinator: str | None, processes: int | None, process: int | None, detect: bool) -> None:
    """Joins the processes of a run: by host:port of process 0, their number and this one's index, or, with `detect`,
    by what the platform tells (Cloud TPU, GKE, SLURM, MPI). Alone, where neither is given."""
    if coordinator is None and not detect:
        return
    if coordinator is not None and (processes is None or process is None):
        raise InputError("--coordinator: give --processes and --process with it")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed: {' '.join(str(error).split())[:300]}; or give --coordinator") from error


def together(work: Callable[[], Any], what: str = "") -> None:
    """Does some work on every process; all raise InputError where one does, and none waits for one that has ended.
    what: of long work, for which the others wait at a barrier of that name."""
    told = ""
    try:
        work()
    except InputError as error:
        told = str(error)
    if jax.process_count() > 1:
        if what:  # a collective operation waits for less long
            barrier(what)
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(told))))
        told = told or (f"process {failed[0]} found what is wrong; see its log" if len(failed) else "")
    if told:
        raise InputError(told)


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


def text_from_first(work: Callable[[], str], what: str) -> str:
    """`from_first` of a text of at most 200 bytes."""
    found: list[str] = []
    first(lambda: found.append(work()), what)
    if jax.process_count() == 1:
        return found[0]
    held = np.zeros(_LONGEST, np.uint8)
    content = "".join(found).encode()
    held[: len(content)] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(held)).astype(np.uint8).tobytes().rstrip(b"\0").decode()


_LONGEST = 200
_asked = itertools.count()
"""Steps at which the processes of a run agreed on; it never falls, as a stage's own step does at the next stage."""


class StopNotice:
    """Whether SIGTERM (a preemption notice) has come; on several hosts, all learn of it at the same step."""

    def __init__(self):
        self._told = threading.Event()
        self._before: Any = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._told.set())
        return self

    def __exit__(self, *exception):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def at_this_step(self) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._told.is_set()


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
