"""Prompts and replies enter, by the hash of what a scorer was asked; scores given before leave, from SQLite.

A batch's scores are on disk when they are kept: whatever ends a run, it goes on behind them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from mpo_jax.database import Database

_SCHEMA = "create table if not exists scores (key blob primary key, score real) without rowid"
_AT_A_TIME = 500  # what SQLite takes as parameters of one statement, in any version


def key(identity: str, prompt: str, reply: str, columns: Any = None) -> bytes:
    """The hash of a scorer's identity (`names.identity`) and what it is asked. columns: of the data's, that it is told
    of."""
    asked = [identity, prompt, reply] + ([columns] if columns else [])
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=20).digest()


class Cache(Database):
    """Scores by key; None is a score too, which says that there is none."""

    def __init__(self, path: epath.PathLike):
        super().__init__(path, _SCHEMA)

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
        self.changed()
