"""The processes of a run enter; where one of them dies without a word, the others end with a sentence that names it.

JAX itself finds a dead process by its heartbeats, and then aborts all others from a thread of its own, with a page of
C++; a dead neighbour's connection shows as a traceback of whatever waited for it. Here each process counts on in the
coordination service's table of keys, and process 0 looks whether all others do.
"""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

from mpo_jax.errors import PREEMPTED, InputError

BEAT = 5.0
"""Seconds between two counts of a process, and between two looks: a small request for each process."""
SILENT = 90.0
"""Seconds without a count after which a process is taken for dead."""
ADVICE = "another process of the run has ended: see its log. Run the same command again; it goes on from what was saved"

_ALIVE, _LOST, _DONE = "mpo_jax/alive", "mpo_jax/lost", "done"
_FAILED = 1
"""Exit code of all after an error on one process alone."""
_GONE = re.compile(
    r"Gloo .*?(closed by peer|reset by peer|Broken pipe|Socket closed|[Cc]onnect\w* refused)"
    r"|remote process exited|heartbeat timeout|Socket closed|tasks are unhealthy",
    re.DOTALL,
)
"""What gloo, NCCL and the coordination service say where a process has gone."""


@contextlib.contextmanager
def watched(give_up: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While the context lasts, this process ends with one sentence once another process of the run has died, or ended
    with an error of its own: within seconds where this one was connected to it, or that one could tell, else after
    `SILENT` seconds. The exit code is that of a preemption, or 1 after an error, which would only come again.

    give_up: what is let go of before the process ends, from whatever thread; it must not wait for others. An
    InputError, which all processes may meet at once or one of them alone, as a full disk, goes its way, and its words
    are in the others' sentence. Stopped, with which all end together, goes its way too.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch(distributed.global_state.client, give_up)
    watch.start()
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        watch.stop()
        raise
    except InputError as error:
        watch.stop(failed=str(error))
        raise
    except BaseException as error:
        if is_of_the_dead(error):
            watch.end_connected()
        watch.stop(failed="see its log")
        raise
    else:
        watch.stop()


def is_of_the_dead(error: BaseException) -> bool:
    """Whether an error, or what it came from, tells that the connection to another process broke."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        # A program that fails as it begins raises ValueError.
        if isinstance(at, jax.errors.JaxRuntimeError | ValueError) and _GONE.search(str(at)):
            return True
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return False


class _Watch:
    """A thread that counts and looks, and what is done when one is missing."""

    def __init__(self, client: Any, give_up: Callable[[], None]):
        self._client, self._give_up = client, give_up
        self._index, self._host = jax.process_index(), socket.gethostname()
        self._over, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._heard = {index: ("", time.monotonic()) for index in range(jax.process_count())}

    def start(self) -> None:
        if self._index:
            _when_aborted(distributed.global_state.coordinator_address, lambda: self._leave(PREEMPTED, ADVICE))
        self._tell("0")  # the host's name is known, however soon the process falls silent
        self._thread.start()

    def stop(self, failed: str = "") -> None:
        """This process has got to its end: nobody waits for its counts. failed: what the others, who may wait for it in
        vain, are told of an error that it met."""
        self._over.set()
        self._thread.join()
        if failed:
            self._tell_lost(_FAILED, f"process {self._index} on {self._host} has ended with an error: {failed}")
            atexit.register(self._leave_behind)
        self._tell(_DONE)

    def _leave_behind(self) -> None:
        """Ends this process, whose error was told by now, before JAX waits at its exit for the others."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._wait_for_hearers()
        os._exit(_FAILED)

    def _wait_for_hearers(self) -> None:
        """Process 0 stays until the others have heard what its service tells them, and have ended: without it JAX
        would abort them."""
        if self._index:
            return
        until = time.monotonic() + 3 * BEAT
        while time.monotonic() < until and not self._alone():
            time.sleep(BEAT / 10)
        time.sleep(BEAT)

    def _alone(self) -> bool:
        """Whether all other processes have got to their end."""
        try:
            counts = self._client.key_value_dir_get(_ALIVE)
        except jax.errors.JaxRuntimeError:
            return False
        done = {int(name.rpartition("/")[2]) for name, value in counts if value.partition(" ")[0] == _DONE}
        return done | {0} == set(self._heard)

    def end_connected(self) -> NoReturn:
        """Ends this process, which has met a broken connection: with what the other one said, if it could."""
        until = time.monotonic() + 2 * BEAT
        while (lost := self._lost()) is None and time.monotonic() < until:
            time.sleep(BEAT / 10)
        self._end(*(lost or (PREEMPTED, ADVICE)))

    def _end(self, code: int, told: str) -> NoReturn:
        """Ends this process, and tells the others."""
        self._tell_lost(code, told)
        self._tell(_DONE)
        self._wait_for_hearers()
        self._leave(code, told)

    def _leave(self, code: int, told: str) -> NoReturn:
        with self._ending:  # once
            os.write(2, f"\n{told}\n".encode())
            letting = threading.Thread(target=self._give_up, daemon=True)
            letting.start()
            letting.join(BEAT)  # a store may not answer
            sys.stdout.flush()
            os._exit(code)

    def _watch(self) -> None:
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            self._tell(str(count))
            lost = self._lost()
            if lost is None and self._index == 0 and (silent := self._silent()) is not None:
                lost = PREEMPTED, f"process {silent} has not been heard from for {SILENT:.0f} s; {ADVICE}"
            # Where all have met the same error, each is given the time to end with it.
            if lost is not None and not self._over.wait(2 * BEAT):
                self._end(*lost)

    def _lost(self) -> tuple[int, str] | None:
        """What a process was told of another that is lost: the exit code for this one, and the sentence."""
        try:
            code, _, told = self._client.key_value_try_get(_LOST).partition(" ")
        except jax.errors.JaxRuntimeError:
            return None
        return int(code), told

    def _tell_lost(self, code: int, told: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first that was lost is told of
            self._client.key_value_set(_LOST, f"{code} {told}")

    def _tell(self, count: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended; `_when_aborted` tells
            value = f"{count} {self._host}"
            self._client.key_value_set(f"{_ALIVE}/{self._index}", value, allow_overwrite=True)

    def _silent(self) -> str | None:
        """The first process that has counted on for too long no more, and its host."""
        now = time.monotonic()
        try:
            counts = self._client.key_value_dir_get(_ALIVE)
        except jax.errors.JaxRuntimeError:  # the service is at its end
            return None
        for name, value in counts:
            index = int(name.rpartition("/")[2])
            if self._heard[index][0] != value:
                self._heard[index] = (value, now)
        for index, (value, since) in self._heard.items():
            count, _, host = value.partition(" ")
            if count != _DONE and index and now - since > SILENT:
                return f"{index}{f' on {host}' if host else ''}"
        return None


_handlers: list[Any] = []
"""What the C library was given must outlive it."""


def _when_aborted(coordinator: str | None, work: Callable[[], None]) -> None:
    """Does some work when this process is about to abort and process 0, with the coordination service, can't be
    reached: JAX's client aborts in a thread of its own then, where no handler of Python's comes in time."""
    host, _, port = (coordinator or "").rpartition(":")
    if not port.isdigit():
        return

    def aborting(_: int) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return  # a fault of this process
        work()

    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborting))
    library.signal(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))
