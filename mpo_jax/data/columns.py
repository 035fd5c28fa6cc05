"""Rows of a source enter; which columns they have, of what kind, and what they mean leaves: by all rows, not the first.

A column that is not read and whose name tells that it should be is an error, since what it says would vanish.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mpo_jax import progress
from mpo_jax.data.reading import ROLES, Reading
from mpo_jax.data.row import Row, is_empty, is_list
from mpo_jax.errors import InputError
from mpo_jax.settings import nearest

_MEANINGFUL = {
    "chosen", "rejected", "response", "responses", "completion", "completions", "answer", "answers", "reply",
    "replies", "output", "outputs", "generation", "generations", "candidate", "candidates", "summary", "summaries",
    "winner", "loser", "target", "targets", "ref", "label", "labels", "preference", "preferences", "preferred",
    "better", "best", "worse", "worst", "safer", "safe", "choice", "rank", "ranks", "ranking", "rating", "ratings",
    "score", "scores", "reward", "rewards", "margin", "helpfulness", "harmlessness", "correctness", "coherence",
    "complexity", "verbosity", "honesty", "truthfulness", "toxicity", "quality", "vote", "votes", "upvotes",
    "thumbs", "feedback", "critique", "system", "persona", "tool", "tools", "function", "functions", "history",
    "context", "messages", "conversation", "conversations", "dialogue", "dialog", "prompt", "question",
    "instruction", "input", "query", "demonstration", "confidence", "judgment", "verdict", "desirable",
    "undesirable", "good", "bad", "correct", "incorrect", "accepted", "acceptable", "liked", "win", "wins", "won",
    "lost", "preamble", "instructions", "questions", "inputs", "queries", "prompts", "sys", "api", "apis", "stars",
    "grade", "grades", "turns", "positive", "negative", "image", "images", "audio", "video",
}  # fmt: skip
_ABOUT = {
    "id", "ids", "model", "models", "source", "sources", "policy", "name", "names", "hash", "sha256", "sha1", "md5",
    "length", "len", "tokens", "token", "type", "category", "url", "lang", "language", "date", "time", "timestamp",
    "version", "count", "num", "number", "idx", "index", "origin", "provider", "author", "annotator", "license",
}  # fmt: skip
_COUNTS = {"num", "n", "len", "number", "count"}


def words(name: str) -> list[str]:
    """The words of a column's name, in lower case: `chosen-avgRating` has three."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def is_meaningful(name: str) -> bool:
    """Whether a column's name tells of replies, labels, ratings, system texts, tools or turns, and not about them."""
    found = words(name)
    if not _MEANINGFUL & set(found):
        return False
    return not (found[0] in _COUNTS or found[-1] in _ABOUT or "sha" in found)


@dataclasses.dataclass(frozen=True)
class Survey:
    """kinds: column → the kinds of its values, of those that say something, in order of appearance; an empty set for a
    column that says nothing in any row. first: column → where it first says something."""

    kinds: Mapping[str, frozenset[str]]
    first: Mapping[str, str]

    def has(self, *names: str) -> bool:
        """Whether each of the columns says something in some row."""
        return all(self.kinds.get(name) for name in names)

    def holds(self, name: str, *kinds: str) -> bool:
        """Whether a column has values of one of the kinds: text, number, bool, list, object."""
        return bool(self.kinds.get(name, frozenset()) & set(kinds))

    def with_empty(self) -> "Survey":
        """The same, columns that say nothing taken as text."""
        return Survey({name: kinds or frozenset({"text"}) for name, kinds in self.kinds.items()}, self.first)

    def first_of(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if self.has(name)), None)


def survey(rows: Sequence[Row]) -> Survey:
    """Of all rows."""
    kinds: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for row in progress.each(rows, "survey", len(rows)):
        for name, value in row.values.items():
            found = kinds.setdefault(name, set())
            if not is_empty(value):
                found.add(_kind(value))
                first.setdefault(name, row.where)
    return Survey({name: frozenset(found) for name, found in kinds.items()}, first)


def _kind(value) -> str:
    if isinstance(value, str | bytes):
        return "text"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "list" if is_list(value) else "object"


def rename(rows: Sequence[Row], reading: Reading, place: str) -> tuple[list[Row], dict[str, str]]:
    """The rows with the names that `reading.columns` gives them, with its constants, without the columns to be ignored;
    and what is to be said of the ignored. InputError for a name that no row has."""
    known = {name for row in rows for name in row.values}
    for role, name in reading.columns.items():
        if name not in known:
            raise InputError(f"data.columns.{role}: {name!r} is no column of {place}{nearest(name, sorted(known))}")
    said = {name: "ignored (data.ignore)" for name in reading.ignore if name in known}
    for role in reading.constants:
        if role in known:
            said[role] = "unread, since data.constants has a text for it"
    if not reading.columns and not said and not reading.constants:
        return list(rows), {}
    for role, name in reading.columns.items():
        if role in known and role != name and role not in reading.columns.values():
            said[role] = f"unread, since data.columns names {name!r} in its place"
    moved = {name: role for role, name in reading.columns.items()}
    left = (set(reading.ignore) | set(reading.columns)) - set(moved)
    return [
        dataclasses.replace(
            row,
            values={moved.get(name, name): value for name, value in row.values.items() if name not in left}
            | dict(reading.constants),
        )
        for row in rows
    ], said


def check_kept(rows: Sequence[Row], keep: Sequence[str], place: str) -> None:
    """InputError for a column to be kept that no row has. rows: by the file's own names."""
    known = {name for row in rows for name in row.values}
    for name in keep:
        if name not in known:
            raise InputError(f"data.keep: {name!r} is no column of {place}{nearest(name, sorted(known))}")


def kept(row: Row, keep: Sequence[str]) -> str:
    """The columns of a row that are kept, as JSON; "" where none is. What JSON has no form for is its text."""

    def plain(value: Any) -> Any:
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    values = {name: row.values[name] for name in keep if name in row.values}
    return json.dumps(values, default=plain, ensure_ascii=False) if values else ""


def check_unread(
    rows: Sequence[Row],
    found: Survey,
    uses: Mapping[str, str],
    known: Collection[str],
    place: str,
    prompts_alone: bool = False,
) -> dict[str, str]:
    """What is to be said of every column that is not used. InputError for those that look as if they should be.

    A column is harmless that says nothing, that the form knows and leaves, or that repeats one that is used.
    prompts_alone: whether no reply is read from the file. Then a column of texts is not harmless either, whatever its
    name: they may be the replies."""
    said, suspicious = {}, []
    for name, kinds in found.kinds.items():
        if name in uses:
            continue
        if not kinds:
            said[name] = "empty"
        elif name in known:
            said[name] = "unread (a column of this form that is not used)"
        elif not is_meaningful(name) and not (prompts_alone and _may_be_replies(rows, name)):
            said[name] = "unread"
        elif same := next((used for used in uses if _same(rows, name, used, uses)), None):
            said[name] = f"unread (the same as {same!r})"
        else:
            suspicious.append(name)
    if suspicious:
        names = ", ".join(map(repr, suspicious))
        raise InputError(
            f"{found.first.get(suspicious[0], place)}: column{'s' * (len(suspicious) > 1)} {names} would not be read "
            f"(read: {', '.join(uses) or 'none'}); say what each is, data.columns.ROLE={suspicious[0]!r} with a role "
            f"of {', '.join(ROLES)}, or leave it out, data.ignore={tuple(suspicious)!r}"
        )
    return said


def _may_be_replies(rows: Sequence[Row], name: str) -> bool:
    """Whether most rows of a column hold a text of several words, and most of these texts differ: as replies do, and
    ids, categories and addresses don't."""
    if _ABOUT & set(words(name)):
        return False
    texts = [" ".join(_texts(row.values.get(name))) for row in rows]
    long = [text for text in texts if len(text.split()) > 2 or (not text.isascii() and len(text) > 8)]
    return 2 * len(long) > len(rows) and 2 * len(set(long)) > len(long)


def _texts(value: Any) -> list[str]:
    """Every text within a value, however deep."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for each in value for text in _texts(each)] if is_list(value) else []


def _same(rows: Sequence[Row], name: str, used: str, uses: Mapping[str, str]) -> bool:
    """Whether a column only repeats another one, or `messages` prompt and reply together."""

    def repeats(row: Row) -> bool:
        value: Any = row.values.get(name)
        other: Any = row.values.get(used)
        if is_empty(value) or value == other:
            return True
        head: Any = row.values.get("prompt")
        return is_list(value) and is_list(other) and is_list(head) and list(value) == [*head, *other]

    return all(repeats(row) for row in rows)
