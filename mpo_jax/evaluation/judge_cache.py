"""Questions enter, by the hash of all that decides their answer; answers paid for before leave, from SQLite.

Every answer is committed when it arrives, and every call is charged before it is sent: a process killed at any instant
loses the calls in flight and no other, and a run that is started again goes on counting where it was.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath

from mpo_jax.database import Database

_SCHEMA = """
create table if not exists answers (
    key text primary key, model text not null, answer text not null,
    prompt_tokens integer not null, answer_tokens integer not null
);
create table if not exists spent (run text primary key, calls integer not null, tokens integer not null);
"""


def key(request: Mapping[str, Any]) -> str:
    """SHA-256 of the request and where it goes. The request holds no API key."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Cache(Database):
    """Answers by key, and what each run has spent."""

    merges: ClassVar[Mapping[str, str]] = {
        "spent": "insert into spent select * from other.spent where true on conflict (run) do update set"
        " calls = max(calls, excluded.calls), tokens = max(tokens, excluded.tokens)"
    }

    def __init__(self, path: epath.PathLike):
        super().__init__(path, _SCHEMA)

    def get(self, key: str) -> str | None:
        found = self._connection.execute("select answer from answers where key = ?", (key,)).fetchone()
        return None if found is None else found[0]

    def charge_call(self, run: str) -> None:
        """Counts a call that is about to be sent."""
        self._connection.execute(
            "insert into spent values (?, 1, 0) on conflict (run) do update set calls = calls + 1", (run,)
        )

    def put(self, run: str, key: str, model: str, answer: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Keeps an answer and charges its tokens, together."""
        self._connection.execute("begin")
        self._connection.execute(
            "insert or replace into answers values (?, ?, ?, ?, ?)", (key, model, answer, prompt_tokens, answer_tokens)
        )
        self._connection.execute(
            "insert into spent values (?, 0, ?) on conflict (run) do update set tokens = tokens + excluded.tokens",
            (run, prompt_tokens + answer_tokens),
        )
        self._connection.execute("commit")
        self.changed()

    def spent(self, run: str) -> tuple[int, int]:
        """(calls, tokens) of a run, over all its processes."""
        found = self._connection.execute("select calls, tokens from spent where run = ?", (run,)).fetchone()
        return (0, 0) if found is None else (found[0], found[1])
