"""Signals enter (SIGTERM, a preemption notice; SIGINT, Ctrl-C); the end of the run leaves, at a batch's boundary.

`Notice` listens for the whole run; long work asks `obey` at every boundary. On several hosts all stop at the same
boundary. They agree on it by the coordination service's table of keys, in the background: nothing is computed on a
device for it, and no step waits for the host. In its place JAX's own preemption service would hear SIGTERM alone.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import jax
from jax._src import distributed

from mpo_jax import progress
from mpo_jax.errors import INTERRUPTED, PREEMPTED, Stopped

CODES = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}
"""The signals that are obeyed, with the exit code of a run that one of them stopped."""
AT_ONCE = 5
"""Signals after which nothing is waited for."""

_POLL = 0.5
"""Seconds between two looks at what other processes were told: two requests a second from each host to process 0."""
_PATIENCE = 5.0
"""Seconds after which it is told that a signal has been heard: a compile or a large batch may take minutes."""
_AGREE = 300_000
"""Milliseconds that the processes have to tell each other where they are."""
_TOLD, _PLACES = "mpo_jax/stop", "mpo_jax/stop_at"


class Notice:
    """Whether the run has been told to stop, while the context lasts; on several hosts, all are told.

    A thread reads the signals: the interpreter runs handlers between two instructions of the main thread, which a
    compile or a batch can be minutes apart. In another thread than the main one, no signal is heard.

    last: the process ends after the context. Until it has, signals don't end it midway (JAX leaves the other processes
    of the run at its exit), nor change its exit code; but the fifth does.
    """

    def __init__(self, last: bool = False) -> None:
        self.code = 0
        self._last_of_process = last
        self._told = threading.Event()
        self._lock = threading.Lock()
        self._boundaries = 0
        self._last: float = math.inf
        self._signals = 0
        self._told_at = math.inf
        self._before: dict[int, Any] = {}
        self._client: Any = distributed.global_state.client if jax.process_count() > 1 else None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> Self:
        global _current
        self._outer, _current = _current, self
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in CODES}
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._outer
        if self._before and not self._last_of_process:
            for number, before in self._before.items():
                signal.signal(number, before)
            signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        if self._before and self._last_of_process:
            threading.Thread(target=self._count, name="signals", daemon=True).start()
            return
        os.close(self._read)
        os.close(self._write)

    @property
    def alone(self) -> bool:
        """Whether the run has this process alone."""
        return self._client is None

    @property
    def told(self) -> bool:
        """Whether this process knows that the run is to stop; others may not know yet."""
        return self._told.is_set()

    def reached(self) -> bool:
        """Counts a boundary; whether the run stops at this one. Every process has to call it equally often."""
        with self._lock:  # not while the processes agree
            self._boundaries += 1
            return self._boundaries >= self._last

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], _POLL)
            for number in os.read(self._read, 64) if ready else b"":
                if number == 0:
                    return
                if number in CODES:
                    self._signal(signal.Signals(number))
            if self._client is not None and self._last == math.inf:
                self._hear()
            if time.monotonic() - self._told_at > _PATIENCE:
                self._told_at = math.inf
                _say("told to stop; the run stops when the present batch, or compilation, is done")

    def _count(self) -> None:
        """Hears signals that come while the process ends."""
        while True:
            for number in os.read(self._read, 64):
                if number in CODES:
                    self._signals += 1
                    if self._signals >= AT_ONCE:
                        self._end(signal.Signals(number))

    def tell(self, code: int) -> None:
        """The run is to stop, with this exit code; the first that is told counts."""
        self.code = self.code or code
        if self._client is None:
            self._last = 0
        else:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was told before this one
                self._client.key_value_set(_TOLD, str(self.code))
        self._told.set()

    def _signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals == 1:
            self._told_at = time.monotonic()
            self.tell(CODES[number])
        elif self._signals < AT_ONCE:
            _say("saving; a fifth signal ends it at once")
        else:
            self._end(number)

    def _end(self, number: signal.Signals) -> NoReturn:
        _say("ended at once")
        os._exit(CODES[number])

    def _hear(self) -> None:
        """Agrees with the other processes on a boundary, where one of them was told."""
        try:
            code = int(self._client.key_value_try_get(_TOLD))
        except jax.errors.JaxRuntimeError:  # nobody was
            return
        with self._lock:
            self._client.key_value_set(f"{_PLACES}/{jax.process_index()}", str(self._boundaries))
            try:
                places = [
                    int(self._client.blocking_key_value_get(f"{_PLACES}/{process}", _AGREE))
                    for process in range(jax.process_count())
                ]
            except jax.errors.JaxRuntimeError:  # one has died, and the runtime ends the others
                _say("told to stop, but another process of the run does not answer")
                self._client = None
                return
            self.code, self._last = code, max(places) + 1
        self._told.set()


_current: Notice | None = None
"""Signals belong to a process, and so does what listens to them."""
_held = 0
"""How many loops are at work that look for themselves whether to stop, as training does, which has a state to save."""


@contextlib.contextmanager
def held() -> Iterator[None]:
    """While the context lasts `reached` alone says whether to stop: what is called beneath does not leave midway."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def reached() -> bool:
    """Whether the run stops at this boundary; every process has to ask equally often. False where nothing listens."""
    return _current is not None and _current.reached()


def obey(where: str = "") -> None:
    """Raises Stopped if the run stops at this boundary, see `reached`. where: how far the work has come."""
    if not _held and reached():
        stop(where)


def told() -> bool:
    """Whether this process knows that the run is to stop: for work that one process does for all (`processes.first`),
    or that a process leaves by itself."""
    return not _held and _current is not None and _current.told


def obey_here(where: str = "") -> None:
    """Raises Stopped if this process was told to stop, see `told`."""
    if told():
        stop(where)


def tell(code: int) -> None:
    """Tells the run to stop with an exit code, as a signal would."""
    if _current is not None:
        _current.tell(code)


def obey_alone(where: str = "") -> None:
    """`obey_here` where the run has one process; of several, each works at its own pace here, and all go on."""
    if _current is not None and _current.alone:
        obey_here(where)


def stop(where: str = "") -> NoReturn:
    """Raises Stopped, with the exit code of the signal."""
    raise Stopped(PREEMPTED if _current is None else _current.code, where)


def _say(line: str) -> None:
    progress.say(line, sys.stderr)
