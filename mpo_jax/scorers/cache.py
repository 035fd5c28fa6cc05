"""Prompts and replies enter, by the hash of what a scorer was asked; scores given before leave, from SQLite.

A batch's scores are on disk when they are kept: whatever ends a run, it goes on behind them.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

_SCHEMA = "create table if not exists scores (key blob primary key, score real) without rowid"
_AT_A_TIME = 500  # what SQLite takes as parameters of one statement, in any version


def key(identity: str, prompt: str, reply: str) -> bytes:
    """The hash of a scorer's identity (`names.identity`) and what it is asked."""
    return hashlib.blake2b(json.dumps([identity, prompt, reply]).encode(), digest_size=20).digest()


class Cache:
    """Scores by key; None is a score too, which says that there is none. As a context manager, it closes its file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Each statement is its own transaction, on disk when it returns.
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=60)
        self._connection.execute("pragma journal_mode = wal")
        self._connection.execute(_SCHEMA)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float | None]:
        """Those of the keys that are known."""
        found: dict[bytes, float | None] = {}
        for start in range(0, len(keys), _AT_A_TIME):
            part = list(keys[start : start + _AT_A_TIME])
            marks = ",".join("?" * len(part))
            found |= dict(self._connection.execute(f"select key, score from scores where key in ({marks})", part))
        return found

    def put(self, scores: Iterable[tuple[bytes, float | None]]) -> None:
        """Keeps a batch, all of it or nothing."""
        self._connection.execute("begin")
        self._connection.executemany("insert or replace into scores values (?, ?)", scores)
        self._connection.execute("commit")
