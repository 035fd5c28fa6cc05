"""Replies of policies enter; comparisons for people to judge leave, blind and in shuffled order, and what they judged.

Judgements lie in SQLite, by annotator and by a hash of what was shown: they count for any evaluation that holds the
same prompt and replies, and for no other.
"""

import csv
import dataclasses
import datetime
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from mpo_jax.database import Database
from mpo_jax.errors import InputError
from mpo_jax.posting import readable

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""What the page is served to without a token."""
CHOICES = ("first", "second", "tie")
WITHDRAWN = ""
"""The choice of a judgement that its annotator took back. Its row stays, so that no other copy brings the old one."""
LONGEST_NAME, LONGEST_COMMENT = 60, 5000
"""Characters."""

_SCHEMA = """
create table if not exists judgements (
    annotator text not null, item text not null, prompt_id integer not null, left text not null, right text not null,
    first text not null, choice text not null, comment text not null, seconds real not null, at text not null,
    primary key (annotator, item)
)
"""


@dataclasses.dataclass(frozen=True)
class Item:
    """One comparison. key: hash of what is shown. texts: the replies of the policies left and right."""

    key: str
    prompt_id: int
    prompt: str
    left: str
    right: str
    texts: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one annotator said of one item. first: the policy that was shown first. choice: the better policy, or "tie".
    at: UTC. seconds: how long it took."""

    annotator: str
    item: str
    prompt_id: int
    left: str
    right: str
    first: str
    choice: str
    comment: str
    seconds: float
    at: str

    @property
    def outcome(self) -> float:
        """1 where left is the better, 0 where right is, 0.5 for a tie."""
        return 0.5 if self.choice == "tie" else float(self.choice == self.left)


def items(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]], seed: int, count: int = 0) -> list[Item]:
    """Every pair of policies on every prompt (of `count` prompts; 0: all) in an order that the seed shuffles.

    The order is the same for everybody, so that annotators who stop early have judged the same items. Replies that are
    the same text are left out: there is nothing to choose.
    """
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(rows))[: count or None]
    made = (item(rows[place], left, right) for place in chosen for left, right in pairs)
    found = list({each.key: each for each in made if each is not None}.values())
    if not found:
        raise InputError("policies: they reply alike to every prompt; there is nothing to compare")
    return [found[place] for place in random.permutation(len(found))]


def item(row: Mapping[str, Any], left: str, right: str) -> Item | None:
    """The comparison of two policies on a line of replies.jsonl; None where they reply alike."""
    texts = (readable(row["replies"][left]["text"]), readable(row["replies"][right]["text"]))
    prompt = readable(row["prompt"])
    if texts[0] == texts[1]:
        return None
    key = hashlib.sha256(json.dumps([prompt, left, right, *texts]).encode()).hexdigest()[:24]
    return Item(key, row["prompt_id"], prompt, left, right, texts)


def left_first(item: Item, annotator: str, seed: int) -> bool:
    """Which side the left policy is shown on: a coin for each annotator and item."""
    return hashlib.sha256(f"{seed}/{annotator}/{item.key}".encode()).digest()[0] % 2 == 0


def checked_name(name: Any) -> str:
    """An annotator's name. InputError unless it is 1 to 60 printable characters. U+FFFD stands for bytes of an address
    that were no text: nobody's name."""
    cleaned = name.strip() if isinstance(name, str) else ""
    if not 1 <= len(cleaned) <= LONGEST_NAME or not cleaned.isprintable() or "\ufffd" in cleaned:
        raise InputError(f"annotator: expected a name of 1 to {LONGEST_NAME} printable characters")
    return cleaned


class Store(Database):
    """Judgements in SQLite, each on disk when the call returns. As a context manager, it closes its file."""

    merges: ClassVar[Mapping[str, str]] = {
        "judgements": "insert or replace into judgements select theirs.* from other.judgements as theirs"
        " left join judgements as ours using (annotator, item) where ours.at is null or theirs.at > ours.at"
    }

    def __init__(self, path: epath.PathLike):
        # The page's server may run in another thread than its maker's; one thread at a time uses it.
        super().__init__(path, _SCHEMA, check_same_thread=False)

    def put(self, judgement: Judgement) -> None:
        """Keeps a judgement, in place of the annotator's earlier one on the same item."""
        values = dataclasses.astuple(judgement)
        self._connection.execute(f"insert or replace into judgements values ({', '.join('?' * len(values))})", values)
        self.changed()

    def get(self, annotator: str, item: str) -> Judgement | None:
        found = self._read("and annotator = ? and item = ?", (annotator, item))
        return found[0] if found else None

    def judged(self, annotator: str) -> list[str]:
        """Keys of the items that an annotator has judged, the latest last."""
        found = self._connection.execute(
            "select item from judgements where annotator = ? and choice <> ? order by at, rowid", (annotator, WITHDRAWN)
        )
        return [row[0] for row in found]

    def all(self) -> list[Judgement]:
        return self._read("order by at, annotator", ())

    def _read(self, rest: str, values: tuple) -> list[Judgement]:
        """Of what was not taken back."""
        names = ", ".join(field.name for field in dataclasses.fields(Judgement))
        query = f"select {names} from judgements where choice <> ? {rest}"
        return [Judgement(*row) for row in self._connection.execute(query, (WITHDRAWN, *values))]


def judge(
    item: Item, annotator: str, seed: int, choice: Any, comment: Any = "", seconds: Any = 0.0, now: str = ""
) -> Judgement:
    """The judgement of an annotator who chose the "first" or "second" reply shown, or "tie". InputError otherwise."""
    if choice not in CHOICES:
        raise InputError(f"choice: expected one of {', '.join(CHOICES)}")
    if not isinstance(comment, str) or len(comment) > LONGEST_COMMENT:
        raise InputError(f"comment: expected text of at most {LONGEST_COMMENT:,} characters")
    if comment != readable(comment):
        raise InputError("comment: holds half a surrogate pair; expected text")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
        raise InputError("seconds: expected a number from 0")
    shown = (item.left, item.right) if left_first(item, annotator, seed) else (item.right, item.left)
    better = "tie" if choice == "tie" else shown[CHOICES.index(choice)]
    return _judgement(item, annotator, shown[0], better, comment, float(seconds), now)


def withdrawn(item: Item, annotator: str, now: str = "") -> Judgement:
    """What takes the place of a judgement that its annotator takes back."""
    return _judgement(item, annotator, item.left, WITHDRAWN, "", 0.0, now)


def _judgement(item: Item, annotator: str, first: str, choice: str, comment: str, seconds: float, now: str):
    at = now or datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return Judgement(annotator, item.key, item.prompt_id, item.left, item.right, first, choice, comment, seconds, at)


def as_jsonl(judgements: Sequence[Judgement]) -> str:
    """A line for each judgement, with its outcome for the left policy."""
    lines = (dataclasses.asdict(judgement) | {"outcome": judgement.outcome} for judgement in judgements)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def as_csv(judgements: Sequence[Judgement]) -> str:
    """The same as a table. What people typed gets an apostrophe where a spreadsheet would take it for a formula."""
    file = io.StringIO()
    names = [field.name for field in dataclasses.fields(Judgement)]
    writer = csv.DictWriter(file, [*names, "outcome"], lineterminator="\n")
    writer.writeheader()
    for judgement in judgements:
        row = dataclasses.asdict(judgement) | {"outcome": judgement.outcome}
        for name in ("annotator", "comment"):
            if row[name][:1] in tuple("=+-@\t\r"):
                row[name] = "'" + row[name]
        writer.writerow(row)
    return file.getvalue()
