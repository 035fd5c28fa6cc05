"""The columns of a file enter; which of them are its prompt, and each row's prompt, leave.

A prompt is text as it is, or turns: messages, or a question with its system text and past turns.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mpo_jax.data.chat import hh_turns, history, is_dialogue, messages
from mpo_jax.data.columns import Survey
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import Turn
from mpo_jax.data.row import Drop, Row, is_empty, is_list
from mpo_jax.errors import InputError

CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog")
QUESTIONS = ("question", "instruction", "query", "input")


@dataclasses.dataclass(frozen=True)
class Head:
    """Which columns are the prompt. column: "" where the replies hold it, and only what stands before it is here.
    joined: the one that follows the prompt after a line break, or "". asked: whether it is said to an assistant, so
    that text becomes a user's turn."""

    column: str
    joined: str
    asked: bool
    system: bool
    history: bool
    tools: bool

    def uses(self) -> dict[str, str]:
        found = ({self.column: "prompt"} if self.column else {}) | (
            {self.joined: "prompt, after a line break"} if self.joined else {}
        )
        for name in ("system", "history", "tools"):
            if getattr(self, name):
                found[name] = {"system": "system turn", "history": "earlier turns", "tools": "tools of the template"}[
                    name
                ]
        return found

    def turns(self, row: Row) -> str | tuple[Turn, ...]:
        """The prompt of a row, with the system text and the past turns before it. A dialogue in HH's form is text here;
        `dialogue` makes turns of it."""
        value = row.values.get(self.column)
        if is_list(value) or isinstance(value, Mapping):
            said = messages(row, self.column)
        else:
            text = row.text(self.column)
            if self.joined and not is_empty(row.values.get(self.joined)):
                text = f"{text}\n{row.text(self.joined)}"
            if not (self.system or self.history):
                return text
            said = dialogue(text) or (Turn("user", text),)
        return (*self.before(row), *said)

    def before(self, row: Row) -> tuple[Turn, ...]:
        """The system's turn and the past ones."""
        system = row.values.get("system") if self.system else None
        turns = () if is_empty(system) else (Turn("system", row.get("system")),)
        return turns + (history(row, "history") if self.history else ())

    def tool_list(self, row: Row) -> str:
        """The tools of a row as JSON, or ""."""
        tools: Any = row.values.get("tools") if self.tools else None
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except ValueError:
                raise InputError(
                    f"{row.where}: key 'tools' is text that is no JSON; expected a list of tools"
                ) from None
        if is_empty(tools) or (isinstance(tools, str) and not tools.strip()):
            return ""
        if not is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError(f"{row.where}: key 'tools': expected a list of objects")
        return json.dumps(list(tools), ensure_ascii=False)


def find(found: Survey, reading: Reading) -> Head | None:
    """The prompt's columns of a file, or None where it has none."""
    column = found.first_of(("prompt", *CONVERSATIONS, *QUESTIONS))
    if column is None:
        return None
    joined = "input" if column in ("instruction", "prompt", "question") and found.holds("input", "text") else ""
    if joined and column != "instruction" and "input" not in reading.columns:
        joined = ""  # a prompt with an input beside it: which it is has to be said
    system, past, tools = found.has("system"), found.has("history"), found.has("tools")
    asked = column in QUESTIONS or system or past or tools or reading.all_asked
    return Head(column, joined, asked, system, past, tools)


def beside(found: Survey) -> Head | None:
    """Of a file whose replies hold the prompt: the columns with what stands before it, or None where there are none."""
    head = Head("", "", True, found.has("system"), found.has("history"), found.has("tools"))
    return head if head.system or head.history or head.tools else None


def dialogue(text: str) -> tuple[Turn, ...]:
    """The turns of a prompt in HH's form; () for any other text."""
    return hh_turns(text) if is_dialogue(text) else ()


def ends_with_question(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Drop unless there is a prompt, and the next word is the assistant's."""
    if not turns or all(turn.role == "system" for turn in turns):
        raise Drop("empty prompt")
    if turns[-1].role not in ("user", "tool"):
        raise Drop("last turn before the replies is not the user's")
    return turns
