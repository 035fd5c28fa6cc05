"""Text records and a tokenizer enter; token rows leave as flat memory-mapped arrays, tokenized once and cached.

A prompt and its replies are encoded apart, so no token ever stands across their boundary.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from etils import epath

from mpo_jax import artifacts, integrity, progress, stopping, store
from mpo_jax.artifacts import MANIFEST
from mpo_jax.data.division import prompt_ids
from mpo_jax.data.pieces import encode_prompts, encode_replies, shorten
from mpo_jax.data.records import TextRecord, records_fingerprint
from mpo_jax.data.tokenizer import Conventions, conventions, fingerprint
from mpo_jax.errors import InputError

FORMAT = 3
"""Raised whenever the encoding changes, so that older caches are not read."""
_CHUNK = 4096
_COLUMNS = ("id", "prompt_id", "confidence", "margin", "label")
_ARRAYS = ("tokens", "offsets", *_COLUMNS)


@dataclasses.dataclass(frozen=True)
class Limits:
    """max_length: tokens of a row, prompt and all replies. max_response: tokens of one reply, its end included.
    max_prompt: tokens of the prompt, BOS included; None: what the replies leave of max_length.
    too_long: "truncate" cuts replies at their end, which is then missing, conversations at the beginning of a turn, the
    system's kept, and prompts without turns at their left, after the BOS; "drop" leaves such rows out. Either way they
    are counted."""

    max_length: int
    max_response: int
    max_prompt: int | None = None
    too_long: str = "truncate"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Which source each row is of, i32 [rows], and the weight with which training draws from each (`mixture.draw`)."""

    source: np.ndarray
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Rows of one prompt and `replies` responses.

    tokens: i32 [all tokens]. offsets: i64 [rows * (1 + replies) + 1], where each piece begins; a row's pieces are its
    prompt, then its replies. id, prompt_id: i32 [rows]. confidence, margin, label (1: a good reply, 0: a bad one): f32
    [rows], NaN where unknown. counts: rows in and kept, and what the limits did. key: hash of tokenizer, template,
    records and limits. mixture: how training draws rows of several sources; None: each once.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    id: np.ndarray
    prompt_id: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray
    label: np.ndarray
    replies: int
    conventions: Conventions
    counts: dict[str, int]
    key: str
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.id)

    @property
    def piece_lens(self) -> np.ndarray:
        """i64 [rows, 1 + replies]: tokens of the prompt and of each reply."""
        return np.diff(self.offsets).reshape(len(self), 1 + self.replies)

    def row(self, index: int) -> list[np.ndarray]:
        """The token ids of one row: the prompt, then each reply."""
        first = index * (1 + self.replies)
        edges = self.offsets[first : first + self.replies + 2]
        return [self.tokens[a:b] for a, b in itertools.pairwise(edges)]


def encode(
    records: Sequence[TextRecord], tokenizer, replies: int, limits: Limits, cache: epath.PathLike | None = None
) -> Encoded:
    """Tokenizes records, or maps the arrays of an earlier run from the folder `cache`.

    replies: 0 (prompts alone), 1 (chosen, for SFT) or 2 (chosen, then rejected). A prompt begins with at most one BOS,
    where the tokenizer's own convention has one; a reply ends with the one token that ends replies of its form
    (`tokenizer.Conventions.reply_end`) unless it was cut. Special tokens spelled out in a text are text, except in what
    a chat template wrote. Rows without a reply that is needed are left out and counted. `Account.encoded` tells the
    counts with those of reading.

    Raises InputError for limits that leave no room for a prompt, where no record has a reply that is needed, and when
    no row is left."""
    _check(limits, replies)
    key = cache_key(records, tokenizer, replies, limits)
    folder = None if cache is None else epath.Path(cache) / key
    if folder is not None and (folder / MANIFEST).exists():
        try:
            return read(folder)
        except InputError as error:  # a cache can be made again, and is
            progress.say(f"cache: {error}", sys.stderr)
            store.remove(folder)
    encoded = _encode(records, tokenizer, replies, limits, key)
    if folder is None:
        return encoded
    write(encoded, folder)
    return read(folder)


def cache_key(records: Sequence[TextRecord], tokenizer, replies: int, limits: Limits) -> str:
    """Hash of all that decides the encoded rows: format, tokenizer content, chat template, records, limits."""
    parts = (FORMAT, fingerprint(tokenizer), records_fingerprint(records), replies, dataclasses.astuple(limits))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# Encoding -------------------------------------------------------------------------------------------------------------


def _check(limits: Limits, replies: int) -> None:
    if replies not in (0, 1, 2):
        raise InputError(f"replies {replies}: expected 0 (prompts alone), 1 (chosen) or 2 (chosen and rejected)")
    if limits.too_long not in ("truncate", "drop"):
        raise InputError(f"too_long {limits.too_long!r}: expected 'truncate' or 'drop'")
    if limits.max_response < 1 and replies:
        raise InputError(f"max_response {limits.max_response}: expected at least 1 token")
    if replies * limits.max_response + 2 > limits.max_length:
        raise InputError(
            f"max_length {limits.max_length} leaves no room for a prompt beside {replies} replies of max_response "
            f"{limits.max_response}; expected max_length >= {replies * limits.max_response + 2}"
        )
    if limits.max_prompt is not None and limits.max_prompt < 2:
        raise InputError(f"max_prompt {limits.max_prompt}: expected at least 2 tokens")


def _encode(records: Sequence[TextRecord], tokenizer, replies: int, limits: Limits, key: str) -> Encoded:
    counts = collections.Counter({"rows": len(records)})
    records = _with_replies(records, replies, counts)
    known = conventions(tokenizer)
    numbers = prompt_ids([record.prompt_key for record in records])
    pieces: list[np.ndarray] = []
    kept: list[int] = []
    starts = range(0, len(records), _CHUNK)
    for start in progress.each(starts, "encode", len(records), size=_CHUNK):
        chunk = range(start, min(start + _CHUNK, len(records)))
        stopping.obey_alone()  # of several processes, one may find in its cache what another encodes
        for templated in (False, True):
            rows = [i for i in chunk if records[i].templated == templated]
            marks = [_marks(records[i]) for i in rows]
            prompts = [records[i].prompt for i in rows]
            columns = [encode_prompts(prompts, tokenizer, known, templated, [mark[0] for mark in marks])]
            for place, name in enumerate(("chosen", "rejected")[:replies], 1):
                texts = [getattr(records[i], name) for i in rows]
                columns.append(encode_replies(texts, tokenizer, known, templated, [mark[place] for mark in marks]))
            for i, row in zip(rows, zip(*columns, strict=True), strict=True):
                fitted = _fit(row, records[i], limits, tokenizer, known, counts)
                if fitted is not None:
                    kept.append(i)
                    pieces.extend(np.asarray(ids, np.int32) for ids in fitted)
    if not kept:
        short = "; raise max_length or max_response" if any("too long" in rule for rule in counts) else ""
        raise InputError(f"no row is left after encoding: {dict(counts)}{short}")
    counts["kept"] = len(kept)
    return Encoded(
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64),
        id=np.array([records[i].id for i in kept], np.int32),
        prompt_id=numbers[kept],
        confidence=np.array([_number(records[i].confidence) for i in kept], np.float32),
        margin=np.array([_number(records[i].margin) for i in kept], np.float32),
        label=np.array([_number(records[i].label) for i in kept], np.float32),
        replies=replies,
        conventions=known,
        counts=dict(counts),
        key=key,
    )


def _with_replies(records: Sequence[TextRecord], replies: int, counts) -> Sequence[TextRecord]:
    """The records that have the replies that are needed; the others are counted, and an error where they are all."""
    for name in ("chosen", "rejected")[:replies]:
        having = [record for record in records if getattr(record, name) is not None]
        if records and not having:
            first = records[0]
            form = f" ({first.form})" if first.form else ""
            raise InputError(
                f"record {first.id} of split {first.split!r}{form} has no {name!r} reply, nor has any other; it is "
                f"needed here: expected {'pairs of replies' if name == 'rejected' else 'prompts with replies'}"
            )
        if len(having) < len(records):
            counts[f"dropped: no {name!r} reply"] += len(records) - len(having)
        records = having
    return records


def _marks(record: TextRecord) -> tuple[str | None, ...]:
    """The marked texts of prompt, chosen and rejected; None each for a record without."""
    return (*record.marked, None, None, None)[:3]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _fit(
    row: Sequence[list[int]], record: TextRecord, limits: Limits, tokenizer, known: Conventions, counts
) -> list[list[int]] | None:
    """A row within the limits, or None if a rule drops it; `counts` says what was done."""
    prompt, *replies = row
    if not prompt:
        counts["dropped: prompt without tokens"] += 1
        return None
    cut = [reply[: limits.max_response] for reply in replies]
    room = limits.max_length - sum(len(reply) for reply in cut)
    room = room if limits.max_prompt is None else min(room, limits.max_prompt)
    long_reply, long_prompt = cut != replies, len(prompt) > room
    if limits.too_long == "drop" and (long_reply or long_prompt):
        counts["dropped: reply too long" if long_reply else "dropped: prompt too long"] += 1
        return None
    if len(cut) == 2 and cut[0] == cut[1]:
        counts["dropped: identical replies once encoded"] += 1
        return None
    if long_prompt and record.chat is not None:
        shorter = shorten(record, tokenizer, known, room)
        if shorter is not None:
            prompt, what = shorter
            counts[what] += 1
        elif record.templated:  # without its beginning it would be no chat
            counts["dropped: prompt too long, even its last turn"] += 1
            return None
    counts["replies truncated"] += sum(len(a) != len(b) for a, b in zip(cut, replies, strict=True))
    counts["prompts truncated"] += long_prompt
    if len(prompt) > room:
        bos = prompt[:1] if prompt[0] == known.bos_id else []
        prompt = bos + prompt[len(prompt) - room + len(bos) :]
    return [prompt, *cut]


def take(encoded: Encoded, rows: np.ndarray, swapped: np.ndarray | None = None, replies: int | None = None) -> Encoded:
    """Some rows, in the order given; of those marked in `swapped` (bool [rows]), the two replies change places.

    replies: keep only the first so many (0: prompts alone).
    """
    replies = encoded.replies if replies is None else replies
    swapped = np.zeros(len(rows), bool) if swapped is None else swapped
    pieces: list[np.ndarray] = []
    for row, swap in zip(rows, swapped, strict=True):
        prompt, *answers = encoded.row(int(row))
        pieces += [prompt, *(answers[::-1] if swap else answers)[:replies]]
    columns = {name: np.asarray(getattr(encoded, name))[rows] for name in _COLUMNS}
    taken = assemble(pieces, replies, encoded.conventions, encoded.key, **columns)
    if encoded.mixture is None:
        return taken
    return dataclasses.replace(taken, mixture=Mixture(encoded.mixture.source[rows], encoded.mixture.weights))


def assemble(
    pieces: Sequence[np.ndarray],
    replies: int,
    known: Conventions,
    key: str,
    id: np.ndarray,
    prompt_id: np.ndarray,
    confidence: np.ndarray | None = None,
    margin: np.ndarray | None = None,
    label: np.ndarray | None = None,
) -> Encoded:
    """Rows from their pieces, each a prompt and `replies` replies as token ids. key: what the rows came from."""
    unknown = np.full(len(id), np.nan, np.float32)
    return Encoded(
        tokens=np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64),
        id=np.asarray(id, np.int32),
        prompt_id=np.asarray(prompt_id, np.int32),
        confidence=unknown if confidence is None else confidence,
        margin=unknown if margin is None else margin,
        label=unknown if label is None else label,
        replies=replies,
        conventions=known,
        counts={"rows": len(id), "kept": len(id)},
        key=key,
    )


def join(*parts: Encoded) -> Encoded:
    """The rows of all, of equally many replies, one after the other, their ids numbered anew, as several may use the
    same. InputError if the replies differ in number."""
    first = parts[0]
    if len({part.replies for part in parts}) > 1:
        numbers = " and of ".join(str(part.replies) for part in parts)
        raise InputError(f"rows of {numbers} replies cannot stand in one set")
    pieces = [piece for part in parts for row in range(len(part)) for piece in part.row(row)]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS if name != "id"}
    ids = np.arange(sum(map(len, parts)), dtype=np.int32)
    key = "+".join(part.key for part in parts)
    return assemble(pieces, first.replies, first.conventions, key, id=ids, **columns)


def rows_fingerprint(encoded: Encoded) -> str:
    """A hash of the rows: tokens, where they begin, ids."""
    state = hashlib.blake2b(digest_size=16)
    for name in ("tokens", "offsets", "id", "prompt_id"):
        state.update(np.ascontiguousarray(getattr(encoded, name)).tobytes())
    return state.hexdigest()


def check_margins(encoded: Encoded, key: str) -> None:
    """InputError, beginning with the setting that asks for margins, unless every row has one."""
    missing = int(np.isnan(encoded.margin).sum())
    if missing:
        raise InputError(
            f"{key}: {missing} of {len(encoded)} pairs have no margin; expected a column 'margin', or ratings of both "
            "replies (score_chosen and score_rejected, or data.columns), or pairs without margins and False here"
        )


def first_of_prompt(encoded: Encoded) -> np.ndarray:
    """The first row of every prompt id, i64, in order: prompts without repeats."""
    _, first = np.unique(encoded.prompt_id, return_index=True)
    return np.sort(first)


# Cache ----------------------------------------------------------------------------------------------------------------


def write(encoded: Encoded, folder: epath.PathLike) -> None:
    """Writes the arrays and, when all are on disk, the manifest with the checksum of each: without it the folder holds
    nothing. Whoever comes second leaves the first's."""
    if (epath.Path(folder) / MANIFEST).exists():
        return
    place = store.local(folder)
    for name in _ARRAYS:
        artifacts.write_file(place / f"{name}.npy", functools.partial(np.save, arr=getattr(encoded, name)))
    rest = {
        "replies": encoded.replies,
        "conventions": dataclasses.asdict(encoded.conventions),
        "counts": encoded.counts,
        "key": encoded.key,
        "files": {f"{name}.npy": integrity.of_file(place / f"{name}.npy") for name in _ARRAYS},
    }
    artifacts.write_json(place / MANIFEST, integrity.seal(artifacts.plain(rest)))
    store.send(folder, last=MANIFEST)


def read(folder: epath.PathLike) -> Encoded:
    """The rows of a folder. InputError, naming the file, where one is missing or damaged."""
    place = store.fetch(folder)
    rest = integrity.unseal(place / MANIFEST, artifacts.read_json(place / MANIFEST))
    integrity.verify(place, rest.pop("files"))
    rest["conventions"] = Conventions(**rest["conventions"])
    return Encoded(**{name: np.load(place / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}, **rest)
