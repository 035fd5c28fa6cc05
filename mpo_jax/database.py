"""The path of an SQLite file enters; the open database leaves, also where the path can't hold one (gs://, gcsfuse).

There it is a copy on this host's disk, sent home from time to time and at its end, whole each time. A process that is
killed loses nothing where the copy survives it, and with its host what came after the last sending: SECONDS at most.
"""

import contextlib
import fcntl
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from etils import epath

from mpo_jax import artifacts, store
from mpo_jax.errors import InputError

SECONDS = 60.0
"""How often what was added is sent home."""


@contextlib.contextmanager
def alone(path: epath.PathLike, flag: str) -> Iterator[None]:
    """Holds the lock of a database while the context lasts; it ends with its process at the latest.

    InputError, which begins with the flag, where another process has it. Of a database whose home can hold none, it is
    this host's lock: hosts merge what they send.
    """
    file = Path(path) if store.holds_databases(path) else store.copy_of(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read(200).strip() or "another process"
            raise InputError(f"{flag}: {path} is in use by {who}; end that first") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


class Database:
    """As a context manager, it closes its file. Each statement is a transaction of its own, on disk when it returns.

    `merges`: table -> how rows of another copy (`other.TABLE`) enter it; by default those whose key is not there.
    """

    merges: ClassVar[Mapping[str, str]] = {}

    def __init__(self, path: epath.PathLike, schema: str, **options: Any):
        self._home = None if store.holds_databases(path) else epath.Path(path)
        file = Path(path) if self._home is None else store.copy_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if self._home is not None and not self._home.exists():
            # Its workdir is new, or was deleted: what an earlier one left here is none of this one's.
            for stale in file.parent.glob(f"{file.name}*"):
                stale.unlink()
        self._file, self._seen, self._sent = file, (0, 0), 0.0
        self._connection = sqlite3.connect(file, isolation_level=None, timeout=60, **options)
        self._connection.execute("pragma journal_mode = wal")
        self._connection.executescript(schema)
        if self._home is not None:
            self._send()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Sends the copy home, where it is one, and closes the file."""
        try:
            if self._home is not None:
                self._send()
        finally:
            self._connection.close()

    def changed(self) -> None:
        """To be called when something was added: the copy is sent home where that is due."""
        if self._home is not None and time.monotonic() - self._sent > SECONDS:
            self._send()

    def _send(self) -> None:
        """Takes in what another host has sent since, and sends the whole."""
        assert self._home is not None
        if self._home.exists() and self._state() != self._seen:
            self._take(self._home.read_bytes())
        whole = self._file.with_name(f".{self._file.name}.{uuid.uuid4().hex}")
        self._connection.execute("vacuum into ?", (str(whole),))
        try:
            artifacts.write_bytes(self._home, whole.read_bytes())
        finally:
            whole.unlink()
        self._seen, self._sent = self._state(), time.monotonic()

    def _state(self) -> tuple[int, int]:
        assert self._home is not None
        found = self._home.stat()
        return found.length, found.mtime

    def _take(self, content: bytes) -> None:
        """Merges another copy. InputError where it is no database."""
        other = self._file.with_name(f".{self._file.name}.{uuid.uuid4().hex}")
        other.write_bytes(content)
        try:
            self._connection.execute("attach database ? as other", (str(other),))
            tables = self._connection.execute("select name from other.sqlite_master where type = 'table'")
            for (table,) in tables.fetchall():
                if not table.startswith("sqlite_"):
                    merge = self.merges.get(table, f"insert or ignore into {table} select * from other.{table}")
                    self._connection.execute(merge)
            self._connection.execute("detach database other")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self._home}: no database that this version reads ({error})") from error
        finally:
            other.unlink()
