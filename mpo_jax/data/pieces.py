"""Texts of prompts and replies enter; their token ids leave, each piece for itself.

A prompt and its replies are encoded apart, so no token ever stands across their boundary. Control tokens spelled out in
a text are text; those that a chat template wrote are tokens.
"""

import re
from collections.abc import Callable, Sequence

from mpo_jax.data import template
from mpo_jax.data.chat import HUMAN, shorter_plain
from mpo_jax.data.records import Chat, TextRecord, Turn
from mpo_jax.data.tokenizer import Conventions

Marked = Sequence[str | None]
"""For each text the same with marks (`records.TextRecord.marked`), or None."""


def encode_prompts(
    texts: Sequence[str], tokenizer, known: Conventions, templated: bool, marked: Marked = ()
) -> list[list[int]]:
    """Token ids of each prompt, beginning with one BOS where the tokenizer's convention has one; a templated prompt
    where its template wrote one (once, however often it did)."""
    found = _ids(texts, tokenizer, templated, marked)
    if known.bos_id is None:
        return found
    result = []
    for ids in found:
        start = 0
        while ids[start : start + 1] == [known.bos_id]:
            start += 1
        result.append(([known.bos_id] if start or not templated else []) + ids[start:])
    return result


def encode_replies(
    texts: Sequence[str], tokenizer, known: Conventions, templated: bool, marked: Marked = ()
) -> list[list[int]]:
    """Token ids of each reply, the one that ends it last (`Conventions.reply_end`).

    A templated reply has the tokens that it has behind the template's header. Any other loses its first space where the
    tokenizer writes one in front of every text."""
    end = known.reply_end(templated)
    result = []
    for ids in (
        _behind_header(texts, tokenizer, known, marked) if templated else _alone(texts, tokenizer, known, marked)
    ):
        while ids and ids[-1] in (known.eos_id, end):
            ids.pop()
        result.append([*ids, end])
    return result


def _alone(texts: Sequence[str], tokenizer, known: Conventions, marked: Marked, templated=False) -> list[list[int]]:
    if known.spaced:
        texts = [text.removeprefix(" ") for text in texts]
    return _ids(texts, tokenizer, templated, marked)


def _behind_header(texts: Sequence[str], tokenizer, known: Conventions, marked: Marked) -> list[list[int]]:
    """Encoded behind what the template writes before a reply, which is then taken off; alone where a token would stand
    across the boundary."""
    lead = template.facts(tokenizer).lead
    if not lead or not texts:
        return _alone(texts, tokenizer, known, marked, templated=True)
    (before,) = _ids([lead], tokenizer, True, ())
    whole = _ids(
        [lead + text for text in texts], tokenizer, True, [None if mark is None else lead + mark for mark in marked]
    )
    across = [place for place, ids in enumerate(whole) if ids[: len(before)] != before]
    result = [ids[len(before) :] for ids in whole]
    picked = [marked[place] for place in across] if marked else ()
    alone = _alone([texts[place] for place in across], tokenizer, known, picked, templated=True)
    for place, ids in zip(across, alone, strict=True):
        result[place] = ids
    return result


def _ids(texts: Sequence[str], tokenizer, templated: bool, marked: Marked) -> list[list[int]]:
    if not texts:
        return []
    clean = [_encodable(text) for text in texts]
    found = tokenizer(
        clean,
        add_special_tokens=False,
        split_special_tokens=not templated,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    marks = list(marked) if marked else [None] * len(texts)
    if not templated:
        marks = [template.marked_text(text, tokenizer) for text in clean]
    for place, mark in enumerate(marks):
        if mark is not None:
            found[place] = template.marked_ids(_encodable(mark), tokenizer)
    return found


def _encodable(text: str) -> str:
    """A lone surrogate (half an emoji in JSON) is not encodable text; it becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


# Prompts above the limit ----------------------------------------------------------------------------------------------


def shorten(record: TextRecord, tokenizer, known: Conventions, room: int) -> tuple[list[int], str] | None:
    """The tokens of a conversation's prompt without its oldest turns, the system's kept, so that `room` suffices, and
    what was done. Where its last turn alone is too long, that one begins with a later sentence, or word.

    None where that does not fit either: then a template's text leaves no room for anything said."""

    def encode(texts: list[str], marked: Marked = ()) -> list[list[int]]:
        return encode_prompts(texts, tokenizer, known, record.templated, marked)

    assert record.chat is not None
    later = _later(record.chat) if record.templated else shorter_plain(record.prompt)

    def from_turn(place: int) -> list[int]:
        chat = later[place]
        if isinstance(chat, str):
            return encode([chat])[0]
        text, mark = _show(chat, tokenizer)
        return encode([text], [mark])[0]

    at_a_turn = _first_that_fits(list(range(len(later))), from_turn, room)
    if at_a_turn is not None:
        return at_a_turn, "prompts cut at a turn"
    head, last, build = _last_turn(record, tokenizer)
    for starts in (_starts(last, r"(?<=[.!?\n])\s+"), _starts(last, r"\s+")):
        fitting = _first_that_fits(starts, lambda start: encode(*build(head, last[start:]))[0], room)
        if fitting is not None:
            return fitting, "prompts cut within a turn"
    return None


def _later(chat: Chat) -> list[Chat]:
    """The conversation from each later turn of the user on, the longest first."""
    system = tuple(turn for turn in chat.turns if turn.role == "system")
    turns = tuple(turn for turn in chat.turns if turn.role != "system")
    starts = [place for place, turn in enumerate(turns) if turn.role == "user" and place]
    return [Chat(system + turns[start:], chat.tools, chat.options) for start in starts]


def _show(chat: Chat, tokenizer) -> tuple[str, str | None]:
    prompt, _, marked = template.render(chat, [], tokenizer)
    return prompt, marked[0] if marked else None


def _last_turn(record: TextRecord, tokenizer) -> tuple[object, str, Callable]:
    """What stands before the last turn's text, that text, and how a prompt is built of both."""
    if not record.templated:
        text = (shorter_plain(record.prompt) or [record.prompt])[-1]
        before, mark, rest = text.rpartition(HUMAN)
        last, _, end = rest.rpartition("\n\n")
        return (before + mark + " ", "\n\n" + end), last.strip(), lambda head, kept: ([head[0] + kept + head[1]],)
    assert record.chat is not None
    chat = (_later(record.chat) or [record.chat])[-1]
    place = max((at for at, turn in enumerate(chat.turns) if turn.role == "user"), default=0)

    def build(head, kept: str):
        turns = list(chat.turns)
        turns[place] = Turn(turns[place].role, kept, turns[place].rest)
        text, mark = _show(Chat(tuple(turns), chat.tools, chat.options), tokenizer)
        return [text], [mark]

    return None, chat.turns[place].content, build


def _starts(text: str, pattern: str) -> list[int]:
    return [found.end() for found in re.finditer(pattern, text) if found.end() < len(text)]


def _first_that_fits(starts: list[int], encode: Callable[[int], list[int]], room: int) -> list[int] | None:
    """By bisection: a later beginning gives fewer tokens."""
    low, high, best = 0, len(starts), None
    while low < high:
        middle = (low + high) // 2
        ids = encode(starts[middle])
        if len(ids) <= room:
            best, high = ids, middle
        else:
            low = middle + 1
    return best
