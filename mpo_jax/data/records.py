"""What a row of a data set says, as text records: the one form that every source is read into.

Two keys of a record decide where it goes: `prompt_key` tells prompts apart, `first_turn` divides them into shares. Both
come from what the data says, never from how a chat template shows it today.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mpo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message. role: system, user, assistant or tool. rest: its other keys (tool calls, a name) as JSON, or ""."""

    role: str
    content: str
    rest: str = ""

    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content} | (json.loads(self.rest) if self.rest else {})


@dataclasses.dataclass(frozen=True)
class Chat:
    """A prompt's conversation. tools: the functions that a model may call, as JSON, or "". options: the template's own
    settings, as JSON, or ""."""

    turns: tuple[Turn, ...]
    tools: str = ""
    options: str = ""

    @property
    def first_turn(self) -> str:
        """What the user said first: the same for a conversation and all its continuations."""
        said = [turn for turn in self.turns if turn.role == "user"] or list(self.turns)
        return said[0].content.strip() if said else ""


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """A prompt and its replies as text.

    rejected is None for posts with a reference summary; chosen is None too for prompts alone. id: the row's number in
    its split, drops included (the pair's, where a row's ranked replies make several). split: the split it came from.
    confidence: the annotator's, margin: how much better chosen is, both in the source's own units. label: of a single
    reply, `chosen`, whether it is a good one; None where nobody said so. templated: prompt and replies were written
    by a chat template, so special tokens in them are meant as such. marked: prompt and replies once more, for the
    rare record whose messages spell out special tokens themselves: those stand between marks there and are text.
    chat: the conversation that the prompt shows, where there is one. kept: columns of its row for scorers, as JSON, or
    "": no part of what a record is. form: the kind of row it was read from, for
    messages.
    """

    prompt: str
    chosen: str | None
    rejected: str | None
    id: int
    split: str
    confidence: float | None = None
    margin: float | None = None
    label: bool | None = None
    templated: bool = False
    marked: tuple[str, ...] = ()
    chat: Chat | None = None
    kept: str = dataclasses.field(default="", compare=False)
    form: str = dataclasses.field(default="", compare=False)

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts: the turns of a conversation, or the text of a prompt without turns."""
        if self.chat is None:
            return self.prompt
        turns = [[turn.role, turn.content.strip(), turn.rest] for turn in self.chat.turns]
        return json.dumps([turns, self.chat.tools], ensure_ascii=False)

    @property
    def first_turn(self) -> str:
        """What divides records into shares: the first thing the user says, or the text of a prompt without turns."""
        return self.prompt if self.chat is None else self.chat.first_turn


def labelled(records: Sequence[TextRecord]) -> list[TextRecord]:
    """Single replies with labels: those that have one, and of every pair its chosen reply as a good one, its rejected
    as a bad one. Ids are numbered anew. InputError for replies of which nobody said whether they are good."""
    single: list[TextRecord] = []
    for record in records:
        if record.label is None and record.rejected is None:
            form = f" ({record.form})" if record.form else ""
            raise InputError(
                f"record {record.id} of split {record.split!r}{form} has no label and no pair of replies; expected "
                "completions with a label, or pairs"
            )
        if record.label is not None:
            single.append(record)
            continue
        for label, reply, marked in ((True, record.chosen, record.marked[:2]), (False, record.rejected,
                                     record.marked[:1] + record.marked[2:])):  # fmt: skip
            single.append(dataclasses.replace(record, chosen=reply, rejected=None, label=label, marked=marked))
    return [dataclasses.replace(record, id=number) for number, record in enumerate(single)]


def records_fingerprint(records: Sequence[TextRecord]) -> str:
    """Hash of every field of every record, in order."""
    state = hashlib.blake2b(digest_size=16)
    names = [field.name for field in dataclasses.fields(TextRecord) if field.compare]
    for record in records:
        state.update(repr([getattr(record, name) for name in names]).encode("utf-8", "surrogatepass") + b"\n")
    return state.hexdigest()
