"""Prompts enter; the share of the data each belongs to and its stable integer id leave.

Both depend on what the prompt says alone, so a prompt never stands in two shares and keeps its id in every stage.
Shares go by a conversation's first turn: a prefix of it and its continuation lie in the same one. Ids go by all of it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError

EVAL = "eval"
SHARES: Mapping[str, float] = {"sft_reward": 0.45, "policy": 0.45, EVAL: 0.1}
"""The default division. Ours: the paper does not publish one."""

SELECT, REPORT = "select", "report"
"""The halves of what is held out: a training watches itself, and chooses a checkpoint, by the first; what is told of a
finished model is measured on the second. Nothing reads both at once, so there is no name for them together."""


def share(prompt: str, fractions: Mapping[str, float] = SHARES) -> str:
    """The share a prompt belongs to, by a blake2b hash of its text. fractions: name → part, adding up to 1.

    InputError if the fractions are negative or do not add up to 1.
    """
    total = sum(fractions.values())
    if abs(total - 1) > 1e-6 or min(fractions.values()) < 0:
        raise InputError(f"shares {dict(fractions)}: expected parts from 0 to 1 that add up to 1, found {total:g}")
    point = int.from_bytes(_hash(prompt, b"share", 8)) / 2**64
    edge = 0.0
    for name, part in fractions.items():
        edge += part
        if point < edge:
            return name
    return [name for name, part in fractions.items() if part > 0][-1]  # rounding of the sum


def share_or_half(prompt: str, fractions: Mapping[str, float] = SHARES) -> str:
    """The share a prompt belongs to, as `share`, and SELECT or REPORT in place of EVAL: half of it each, by another
    hash."""
    found = share(prompt, fractions)
    if found != EVAL:
        return found
    return SELECT if _hash(prompt, b"heldout", 1)[0] < 128 else REPORT


def names(fractions: Mapping[str, float] = SHARES) -> list[str]:
    """What `select` can be asked for: the shares, and the halves in place of EVAL."""
    return [name for share in fractions for name in ((SELECT, REPORT) if share == EVAL else (share,))]


def select(records: Iterable[TextRecord], name: str, fractions: Mapping[str, float] = SHARES) -> list[TextRecord]:
    """The records of one share, or of one half of EVAL, divided by their first turns. InputError for an unknown name,
    and for one that holds no record."""
    if name not in names(fractions):
        raise InputError(f"unknown share {name!r}; expected one of {', '.join(names(fractions))}")
    records = list(records)
    firsts = {record.first_turn for record in records}
    inside = {first for first in firsts if share_or_half(first, fractions) == name}
    if not inside:
        parts = ", ".join(f"{key} {part:g}" for key, part in fractions.items())
        halved = f" ({EVAL} into halves, {SELECT} and {REPORT})" if name in (SELECT, REPORT) else ""
        raise InputError(
            f"share {name!r} holds no record: the data has {len(firsts)} distinct prompt{'s' * (len(firsts) != 1)} "
            f"(conversations count by their first turn) in {len(records)} record{'s' * (len(records) != 1)}, divided "
            f"into {parts}{halved}; bring more prompts, give {EVAL if halved else name!r} a larger part of "
            "data.shares, or name held-out data with data.eval_split"
        )
    return [record for record in records if record.first_turn in inside]


def without(records: Iterable[TextRecord], heldout: Iterable[TextRecord]) -> list[TextRecord]:
    """The records whose conversations are not held out too: none begins as one of `heldout` does."""
    taken = {record.first_turn for record in heldout}
    return [record for record in records if record.first_turn not in taken]


def unique_prompts(records: Iterable[TextRecord]) -> list[TextRecord]:
    """The first record of every prompt, in order."""
    first: dict[str, TextRecord] = {}
    for record in records:
        first.setdefault(record.prompt_key, record)
    return list(first.values())


def prompt_ids(prompts: Sequence[str]) -> np.ndarray:
    """i32 [rows], from 0 to 2**31 - 1: equal for equal prompts, different for different ones.

    An id is a hash of the text. Where two texts of the data set meet in one id, the one whose full digest is lower
    keeps it and the other is hashed again with a counter, so the result does not depend on the order of the rows.
    """
    digests = {prompt: _hash(prompt, b"", 16) for prompt in prompts}
    taken: dict[int, str] = {}
    waiting = sorted(digests, key=digests.__getitem__)
    attempt = 0
    while waiting:
        late = []
        for prompt in waiting:
            number = int.from_bytes(_hash(prompt, b"id%d" % attempt, 4)) & 0x7FFFFFFF
            if taken.setdefault(number, prompt) != prompt:
                late.append(prompt)
        waiting, attempt = late, attempt + 1
    ids = {prompt: number for number, prompt in taken.items()}
    return np.array([ids[prompt] for prompt in prompts], np.int32)


def folds(prompt_id: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` about equal parts each prompt belongs to, i32 [rows]: 0 to count - 1, by its id alone."""
    return np.asarray(prompt_id, np.int32) % np.int32(count)


def _hash(prompt: str, purpose: bytes, size: int) -> bytes:
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=size, person=purpose).digest()
