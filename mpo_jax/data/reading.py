"""How the rows of a source are to be read, beyond what they say themselves: the settings under `config.data`."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from mpo_jax.data import template
from mpo_jax.errors import InputError

SYSTEMS = ("turn", "user")
CONSTANTS = ("prompt", "input", "system", "tools")
"""Roles that may have one text for all rows."""
RANKED = ("best_worst", "all", "adjacent")
KEYS = (
    "path", "split", "eval_split", "limit", "columns", "ignore", "template", "template_kwargs", "system",
    "common_prompt", "ranked", "constants", "end_of_turn", "keep",
)  # fmt: skip
"""The settings under `config.data` that say where records are and how they are read, which every named source has."""
_KEY = re.compile(rf"\bdata\.({'|'.join(KEYS)})\b")


@contextlib.contextmanager
def of_source(name: str):
    """What is wrong with a setting of the data is told as one of the named source; "" for the run's own."""
    try:
        yield
    except InputError as error:
        if not name:
            raise
        raise InputError(_KEY.sub(rf"data.sources.{name}.\1", str(error))) from error


ROLES = {
    "prompt": "the prompt, as text or messages",
    "messages": "a whole conversation, whose last turn is the reply, or the prompt of a pair, as messages",
    "input": "a text that is joined to the prompt by a line break",
    "chosen": "the better reply",
    "rejected": "the worse reply",
    "completion": "the only reply, a demonstration",
    "label": "the label of a completion: true or 1 if it is good, false or 0 if it is bad",
    "first": "one of two replies",
    "second": "the other of two replies",
    "choice": "the choice between first and second: 0 or 1, 1 or 2, below or above 0, or a name",
    "system": "the system text",
    "history": "earlier turns, as [user, assistant] pairs or as messages",
    "tools": "the functions that a model may call",
    "margin": "the margin: how much better chosen is than rejected",
    "score_chosen": "the rating of the better reply",
    "score_rejected": "the rating of the worse reply",
    "confidence": "the annotator's confidence",
    "split": "the split that a row belongs to",
}
"""What a column can be: the keys of `Reading.columns`."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """columns: role (`ROLES`) → the file's name for it, where the file has another. ignore: columns that look as if
    they meant something and are to be left unread. template: "auto" shows conversations by the tokenizer's chat
    template, where it has one, and prompts that are plain text as they are; "plain" shows all in HH's form; "chat"
    makes plain prompts a user's turn too, as any template named here does (`template.chosen`); the tokenizer that
    records are shown by has it (`template.dressed`). template_kwargs: the template's own settings. system: "turn",
    or "user" for templates that take no system turn: its text then begins the first user's. common_prompt: where
    pairs have no prompt column, the beginning that both replies have in common is the prompt. constants: role
    (`CONSTANTS`) → a text that every row has in it. ranked: which of a row's ranked replies are paired: the best
    with the worst, every two, or each with the next in rank. keep: columns, by the file's names, that functions are
    told of as they stand (`TextRecord.kept`). labelled: single replies with a label stay single, bad
    ones too, instead of becoming demonstrations and pairs.

    InputError for a value outside these."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    template: str = "auto"
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str = "turn"
    common_prompt: bool = False
    constants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ranked: str = "best_worst"
    labelled: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self):
        for role in self.columns:
            if role not in ROLES:
                raise InputError(f"data.columns: unknown role {role!r}; expected one of {', '.join(ROLES)}")
        for role in self.constants:
            if role in self.columns:
                raise InputError(f"data.constants.{role}: data.columns.{role} names a column too; expected one of them")
        if len(set(self.columns.values())) < len(self.columns):
            raise InputError(f"data.columns: {dict(self.columns)} names a column twice; expected one role for each")
        template.chosen(self.template)
        choices = (("system", SYSTEMS), ("ranked", RANKED))
        for key, value, known in ((key, getattr(self, key), known) for key, known in choices):
            if value not in known:
                raise InputError(f"data.{key}: {value!r}; expected one of {', '.join(known)}")
        if both := sorted(set(self.keep) & set(self.ignore)):
            raise InputError(f"data.keep: {both[0]!r} is in data.ignore too; expected it in one of them")
        taken = _template_arguments() & set(self.template_kwargs) if self.template_kwargs else set()
        if taken:
            raise InputError(
                f"data.template_kwargs: {', '.join(sorted(taken))} cannot be set here; they are not a template's own"
            )

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Reading":
        """From the settings under `config.data`, where an empty name for a role means the role's own."""
        names = {field.name for field in dataclasses.fields(cls)} & set(data)
        given: dict[str, Any] = {name: data[name] for name in names}
        roles = {
            key: {role: name for role, name in dict(given.get(key) or {}).items() if name}
            for key in ("columns", "constants")
        }
        return cls(**(given | roles | {name: tuple(given.get(name) or ()) for name in ("ignore", "keep")}))

    @property
    def all_asked(self) -> bool:
        """Whether prompts that are plain text are a user's turn."""
        return self.template not in ("auto", "plain")


def _template_arguments() -> set[str]:
    from transformers import PreTrainedTokenizerBase

    names = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs", "self"}
    return names | {"messages", "strftime_now"}
