"""Conversations as data sets write them enter: message lists, HH's dialogues, pairs of past turns; turns leave.

The names that sources have for the speakers are known here, and so is HH's form, `\\n\\nHuman: …\\n\\nAssistant: …`,
which is also how a conversation is shown to a model that has no chat template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_jax.data.records import Turn
from mpo_jax.data.row import Drop, Row, is_list, is_null, kind_of
from mpo_jax.errors import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {
    "user": ("user", "human", "prompter", "customer", "instruction"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai", "chatbot", "response"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
_ROLE = {name: role for role, names in ROLES.items() for name in names}
_CALL = "function_call"
_REST = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_TEXTS = ("content", "value", "text")


# Messages -------------------------------------------------------------------------------------------------------------


def messages(row: Row, key: str) -> tuple[Turn, ...]:
    """The turns of a column that holds a message object or a list of them. InputError (line, key) for anything else."""
    value = row.values.get(key)
    if is_null(value):
        raise Drop(f"no {key!r} (missing or null, expected messages)")
    if isinstance(value, Mapping) and is_list(value.get("messages")):  # OpenAI's preference files: {"messages": [...]}
        key, value = f"{key}.messages", value["messages"]
    elif isinstance(value, Mapping) and value and all(is_list(inner) for inner in value.values()):
        # `datasets` and TFDS turn a list of objects into an object of lists
        value = [dict(zip(value, inner, strict=False)) for inner in zip(*value.values(), strict=False)]
    elif isinstance(value, Mapping):
        return (_message(row, key, value),)
    else:
        value = row.get(key, list)
    return tuple(_message(row, f"{key}[{place}]", inner) for place, inner in enumerate(value))


def _message(row: Row, key: str, value) -> Turn:
    if not isinstance(value, Mapping):
        raise InputError(f"{row.where}: key {key!r} holds {kind_of(value)}, expected a message object")
    given = next((name for name in ("role", "from") if isinstance(value.get(name), str)), None)
    if given is None:
        raise InputError(f"{row.where}: key {key!r}: a message without 'role' or 'from'; its keys: {', '.join(value)}")
    word = value[given].strip().lower()
    rest = {name: value[name] for name in _REST if value.get(name)}
    text = _text(row, key, value)
    if word == _CALL:
        return Turn("assistant", "", json.dumps({"tool_calls": [_call(row, key, text)]}, ensure_ascii=False))
    if word not in _ROLE:
        raise InputError(
            f"{row.where}: key {key!r}: unknown role {value[given]!r}; expected one of {', '.join(sorted(_ROLE))}"
        )
    if text is None and not rest.get("tool_calls"):
        raise InputError(f"{row.where}: key {key!r}: a message whose content is null, and no tool_calls beside it")
    return Turn(_ROLE[word], text or "", json.dumps(rest, ensure_ascii=False) if rest else "")


def _text(row: Row, key: str, value: Mapping[str, Any]) -> str | None:
    """A message's text: a string, or the text parts of a list of parts."""
    name = next((name for name in _TEXTS if name in value), None)
    if name is None:
        if value.get("tool_calls"):
            return None
        raise InputError(
            f"{row.where}: key {key!r}: a message without 'content' or 'value'; its keys: {', '.join(value)}"
        )
    text = value[name]
    if isinstance(text, bytes):
        return text.decode("utf-8")
    if is_list(text):
        kinds = {part.get("type", "text") if isinstance(part, Mapping) else kind_of(part) for part in text}
        if kinds - {"text"}:
            found = ", ".join(sorted(map(str, kinds - {"text"})))
            raise InputError(f"{row.where}: key {key + '.' + name!r} has parts of kind {found}; only text can be read")
        return "".join(str(part.get("text") or "") for part in text)
    if text is not None and not isinstance(text, str):
        raise InputError(f"{row.where}: key {key + '.' + name!r} is {kind_of(text)}, expected text")
    return text


def _call(row: Row, key: str, text: str | None) -> dict[str, Any]:
    """A ShareGPT turn `function_call`, whose text is JSON, as a tool call."""
    try:
        call = json.loads(text or "")
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{row.where}: key {key!r}: a function_call that is no JSON with name and arguments") from None


def history(row: Row, key: str) -> tuple[Turn, ...]:
    """Past turns: a list of [user, assistant] pairs, or messages. () where there are none."""
    value = row.values.get(key)
    if not value:
        return ()
    if is_list(value) and all(isinstance(pair, Mapping) for pair in value):
        return messages(row, key)
    if not is_list(value) or any(
        not is_list(p) or len(p) != 2 or not all(isinstance(t, str) for t in p) for p in value
    ):
        raise InputError(
            f"{row.where}: key {key!r}: expected a list of [user, assistant] texts, found {kind_of(value)}"
        )
    return tuple(Turn(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True))


# HH's form ------------------------------------------------------------------------------------------------------------


def split_hh(text: str) -> tuple[str, str]:
    """A dialogue `\\n\\nHuman: …\\n\\nAssistant: …` into (prompt up to and with the last `Assistant:`, last reply)."""
    at = text.rfind(ASSISTANT)
    if at < 0:
        raise Drop("no assistant turn")
    at += len(ASSISTANT)
    if HUMAN in text[at:]:
        raise Drop("last turn is not the assistant's")
    return text[:at], text[at:]


_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def is_dialogue(text) -> bool:
    """Whether a text is a prompt in HH's form: it begins with a human turn and ends where the assistant is to speak."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:", text)) and bool(re.search(r"\n\nAssistant:\s*$", text))


def is_whole_dialogue(text) -> bool:
    """Whether a text is a dialogue in HH's form with its last reply."""
    return isinstance(text, str) and bool(re.match(r"\s*Human:", text)) and ASSISTANT in text and not is_dialogue(text)


def hh_turns(prompt: str) -> tuple[Turn, ...]:
    """The turns of a prompt in HH's form, without the empty assistant's at its end. Turns of one speaker that follow
    each other are one, since chat templates want speakers in turn. What stands before the first is the system's."""
    pieces = _MARK.split(prompt if prompt.startswith("\n\n") else prompt.lstrip())
    turns = [Turn("system", pieces[0].strip())] if pieces[0].strip() else []
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        role, text = ("user" if name == "Human" else "assistant"), text.strip()
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content}\n\n{text}".strip())
        else:
            turns.append(Turn(role, text))
    if turns and turns[-1] == Turn("assistant", ""):
        turns.pop()
    return tuple(turns)


def plain_chat(turns: Sequence[Turn]) -> str:
    """The form of a chat without a chat template: HH's, `\\n\\nHuman: …\\n\\nAssistant: …`, a system text first.

    A text that spells out such a mark itself loses one line break before it, so that it opens no turn."""
    names = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}
    return "".join(names.get(t.role, f"\n\n{t.role.capitalize()}: ") + no_marks(t.content) for t in turns)


def no_marks(text: str) -> str:
    """A text within a plain chat, whose own `\\n\\nHuman:` and the like open no turn."""
    return re.sub(r"\n\n+(?=(?:Human|Assistant|Tool):)", "\n", text)


def shorter_plain(prompt: str) -> list[str]:
    """A prompt in HH's form from each of its later human turns on, longest first; what stands before its first turn
    (a system text) stays."""
    starts = [found.start() for found in re.finditer(re.escape(HUMAN), prompt)]
    if re.match(r"\s?Human:", prompt):  # its first turn has no line breaks before it
        return [prompt[start:] for start in starts]
    return [prompt[: starts[0]] + prompt[start:] for start in starts[1:]]
