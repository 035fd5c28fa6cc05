"""A piece of a run's folder enters; one run at a time works on it, and another is told in a line who does.

A lock is a small file: host, process, when it began, a nonce, and a count that a thread moves on while the process
lives. It works on object stores too, which have no exclusive creation: the nonce is read back after a moment.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mpo_jax import artifacts, processes, progress, stopping
from mpo_jax.errors import InputError

BEAT = 20.0
"""Seconds between two movements of a lock's count."""
STALE = 6 * BEAT
"""Seconds without one after which a process of another machine is taken for dead; a network file system may show it a
minute late."""
SHARED_SECONDS = 10.0
"""How long a process looks for what process 0 wrote into the workdir."""

_MOMENT = 1.0
"""Seconds after which a nonce in an object store is read back."""
_LOOK = 0.2
"""Seconds between two looks at a lock."""
_LOST = 1
"""Exit code of a run whose lock another has taken."""


@contextlib.contextmanager
def held(path: epath.Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds a lock while the context lasts; process 0 alone takes it, and all go on when it has it.

    path: of its file. what: what is locked, for the sentence. wait: until it is free, rather than to raise InputError
    that names who holds it. A stale lock is taken over, which is told: its process has ended, or, on another machine,
    does not move its count. Where another run takes it from this one, which was stopped for minutes, this one ends.
    """
    taken: list[_Held] = []
    try:
        processes.first(lambda: taken.append(_Held(path, _take(path, what, wait))), f"lock of {what}")
        yield
    finally:
        for each in taken:
            each.release()


def give_up() -> None:
    """Lets go of all locks of this process, which ends without ado: the next run need not find out that it is dead."""
    for each in list(_mine):
        each.release()


def check_shared(workdir: epath.Path) -> None:
    """InputError on all processes of a run if one of them does not see, within seconds, what process 0 writes into the
    workdir."""
    if jax.process_count() == 1:
        return

    def write() -> bytes:
        nonce = uuid.uuid4().hex
        artifacts.write_text(workdir / f".shared-{nonce}", nonce)
        return nonce.encode()

    nonce = processes.told_by_first(write).decode()
    path = workdir / f".shared-{nonce}"

    def look() -> None:
        until = time.monotonic() + SHARED_SECONDS
        while not path.exists():
            if time.monotonic() > until:
                raise InputError(
                    f"--workdir: {workdir}: process {jax.process_index()} on {socket.gethostname()} does not see what "
                    "process 0 wrote there; expected one file system, or bucket, for all processes"
                )
            time.sleep(_LOOK)

    try:
        processes.together(look)
    finally:
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)


def check_free(workdir: epath.Path) -> None:
    """InputError where a run is at work on a stage of the folder."""
    folder = workdir / artifacts.LOCKS
    for path in sorted(folder.glob("*.json")) if folder.exists() else []:
        if (holder := _read(path)) is not None and _lives(path, holder):
            raise InputError(f"{workdir}: {path.stem} is being worked on by {_who(holder)}; wait until it has ended")


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"


def _take(path: epath.Path, what: str, wait: bool) -> dict[str, Any]:
    """Takes the lock; what its file says."""
    own = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "nonce": uuid.uuid4().hex,
        "count": 0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    said = False
    while not _create(path, own):
        holder = _read(path)
        if holder is None:  # released meanwhile
            continue
        who = _who(holder)
        if not said and holder.get("machine") not in (None, own["machine"]):
            progress.say(
                f"{what}: locked by {who}; checking, for up to {STALE:.0f} s, whether that process is alive", sys.stderr
            )
        if not _lives(path, holder):
            progress.say(f"{what}: the lock of {who}, is taken over, because that process has ended", sys.stderr)
            _remove(path, holder)
        elif not wait:
            raise InputError(
                f"{path.parent.parent}: {what} is being worked on by {who}; wait until it has ended (--wait does), "
                "or take another --workdir"
            )
        else:
            if not said:
                progress.say(f"{what}: waiting for {who}", sys.stderr)
                said = True
            stopping.obey_here(f"the lock of {what}")
            time.sleep(1)
    return own


def _create(path: epath.Path, own: dict[str, Any]) -> bool:
    """Writes the lock's file if there is none."""
    if artifacts.is_remote(path):
        if path.exists():
            return False
        artifacts.write_json(path, own)
        time.sleep(_MOMENT)
        return (_read(path) or {}).get("nonce") == own["nonce"]
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    artifacts.write_json(path, own)
    return True


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What a lock's file says; None where there is none, {} where it stays unreadable: its process ended over it."""
    for _ in range(10):
        try:
            found = artifacts.read_json(path)
        except InputError:
            if not path.exists():
                return None
            time.sleep(_LOOK)
            continue
        return found if isinstance(found, dict) else {}
    return {}


def _remove(path: epath.Path, holder: dict[str, Any]) -> None:
    """Takes away a stale lock, unless another run was faster: renaming succeeds once."""
    if artifacts.is_remote(path):
        if _read(path) == holder:
            path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if (_read(aside) or {}).get("nonce") != holder.get("nonce"):
        with contextlib.suppress(OSError):  # somebody else's, and fresh: it goes back
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _lives(path: epath.Path, holder: dict[str, Any]) -> bool:
    """Whether the process that holds a lock lives: on this machine by its number and when it began, elsewhere if the
    lock's count moves."""
    if not {"machine", "pid", "started", "host"} <= holder.keys():
        return False
    if holder["machine"] == _machine():
        return holder["started"] == _started(holder["pid"])
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        if _read(path) != holder:
            return True
        stopping.obey_here()
        time.sleep(min(_LOOK * 5, BEAT))
    return False


def _machine() -> str:
    """What gives process numbers their meaning: a boot, and a container's name space; else the host."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process of this machine began, in the kernel's own count; "" where none of that number lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # proc(5): the state, and the 22nd field of all
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"


class _Held:
    """A lock that this process has, and the thread that moves its count."""

    def __init__(self, path: epath.Path, own: dict[str, Any]):
        self._path, self._own = path, own
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        _mine.append(self)

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):  # a file system that stutters; the next beat tells
                if (_read(self._path) or {}).get("nonce") != self._own["nonce"]:
                    print(f"{self._path}: another run has taken this lock; this one ends", file=sys.stderr, flush=True)
                    stopping.tell(_LOST)
                    return
                self._own["count"] += 1
                artifacts.write_json(self._path, self._own)

    def release(self) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if (_read(self._path) or {}).get("nonce") == self._own["nonce"]:
                self._path.unlink(missing_ok=True)
        with contextlib.suppress(ValueError):  # given up before
            _mine.remove(self)


_mine: list[_Held] = []
"""The locks that this process holds."""
