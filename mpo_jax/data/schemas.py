"""The rows of one file enter; the form that they are of leaves, and what each of them says, as the model knows it.

A form is recognised by the columns of all rows. A value of the wrong kind is an InputError that names the place and the
key; a row that teaches nothing (empty, identical, two prompts) is dropped by a named rule and counted.
"""

import json
from collections.abc import Sequence
from typing import Any

from mpo_jax.data import suggest, template
from mpo_jax.data.chat import ASSISTANT, no_marks, plain_chat, split_hh
from mpo_jax.data.columns import Survey, survey
from mpo_jax.data.forms import choices, dialogues, replies, tldr
from mpo_jax.data.forms.base import Form, Said
from mpo_jax.data.reading import ROLES, Reading
from mpo_jax.data.records import Chat, TextRecord, Turn
from mpo_jax.data.row import Drop, Row
from mpo_jax.errors import InputError

__all__ = ["FORMS", "Drop", "Row", "TextRecord", "plain_chat", "recognise", "show", "split_hh"]

FORMS = (*choices.FORMS, *tldr.FORMS, *replies.FORMS, *dialogues.FORMS, tldr.POSTS)
"""In order: the first that matches is taken."""


def recognise(found: Survey, rows: Sequence[Row]) -> tuple[Form, Survey]:
    """The form of a file, from all its rows, and the survey that it was found by: columns that say nothing in any row
    count where there is no form without them. InputError listing the columns if there is none."""
    for seen in (found, found.with_empty()):
        for form in FORMS:
            if form.matches(seen, rows):
                return form, seen
    known = "; ".join(f"{form.name}: {form.columns}" for form in FORMS)
    columns = ", ".join(sorted(name for name in found.kinds)) or "(none)"
    where = rows[0].where if rows else "no row"
    raise InputError(
        f"{where}: unrecognised columns {columns}; expected {known}; or say what each column is, "
        f"data.columns.ROLE='NAME', with roles {', '.join(ROLES)}{suggest.hint(found)}"
    )


def form_of(row: Row) -> str:
    """The name of a single row's form."""
    return recognise(survey([row]), [row])[0].name


def show(said: Said, tokenizer, reading: Reading, where: str) -> tuple[dict[str, Any], str]:
    """What a row says as the fields of a TextRecord, and how it is written: "chat template", "HH's form" or "text as it
    is". Drop for empty prompts, empty replies and identical replies; InputError for what cannot be shown."""
    numbers = {"confidence": said.confidence, "margin": said.margin}
    if isinstance(said.prompt, str):
        _check(said.prompt, [said.chosen, said.rejected])
        return {"prompt": said.prompt, "chosen": said.chosen, "rejected": said.rejected, **numbers}, "text as it is"
    turns = _system_as_asked(said.prompt, reading)
    sides = [side for side in (said.chosen, said.rejected) if isinstance(side, Turn)]
    _check("".join(turn.content for turn in turns), [_body(side) for side in sides])
    if not said.plain and any(not turn.content.strip() and not turn.rest for turn in turns):
        raise Drop("empty turn")
    options = json.dumps(dict(reading.template_kwargs), ensure_ascii=False) if reading.template_kwargs else ""
    chat = Chat(turns, said.tools, options)
    if template.has_template(tokenizer) and reading.template != "plain":
        if turns[0].role == "assistant":
            raise Drop("the assistant speaks first")
        prompt, texts, marked = template.render(chat, sides, tokenizer, where)
        shown = "chat template"
    else:
        if reading.template == "chat":
            raise InputError("data.template='chat': the tokenizer has no chat template; expected 'auto' or 'plain'")
        prompt, *texts = said.plain or _plain(chat, sides, where)
        marked, shown = (), "HH's form"
    chosen, rejected = (*texts, None, None)[:2]
    return {
        "prompt": prompt, "chosen": chosen, "rejected": rejected, **numbers,
        "templated": shown == "chat template", "marked": marked, "chat": chat,
    }, shown  # fmt: skip


def _check(prompt: str, sides: Sequence[Any]) -> None:
    if not prompt.strip():
        raise Drop("empty prompt")
    texts = [side for side in sides if side is not None]
    if any(not text.strip() for text in texts):
        raise Drop("empty reply")
    if len(texts) == 2 and texts[0].strip() == texts[1].strip():
        raise Drop("identical replies")


def _body(side: Turn) -> str:
    return side.content + side.rest


def _system_as_asked(turns: tuple[Turn, ...], reading: Reading) -> tuple[Turn, ...]:
    """The turns, the system's text at the beginning of the first user's where `data.system` says so."""
    if reading.system == "turn" or not any(turn.role == "system" for turn in turns):
        return turns
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    rest = [turn for turn in turns if turn.role != "system"]
    place = next((at for at, turn in enumerate(rest) if turn.role == "user"), 0)
    rest[place] = Turn(rest[place].role, f"{system}\n\n{rest[place].content}", rest[place].rest)
    return tuple(rest)


def _plain(chat: Chat, sides: Sequence[Turn], where: str) -> tuple[str, ...]:
    """A conversation in HH's form, which has no words for tools."""
    remedy = "expected a model with a chat template that knows them"
    if chat.tools:
        raise InputError(f"{where}: key 'tools': {remedy}; or leave them out, data.ignore=('tools',)")
    for place, turn in enumerate((*chat.turns, *sides)):
        if "tool_calls" in turn.rest or turn.role == "tool":
            what = "tool_calls" if "tool_calls" in turn.rest else "a tool's turn"
            raise InputError(f"{where}: turn {place + 1} holds {what}: {remedy}, or data without such rows")
    return plain_chat(chat.turns) + ASSISTANT, *(f" {no_marks(side.content.strip())}" for side in sides)
