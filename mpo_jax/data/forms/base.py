"""What a form of rows is: how it is recognised, and how a row of it is read."""

import dataclasses
from collections.abc import Callable, Sequence

from mpo_jax.data.columns import Survey
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import Turn
from mpo_jax.data.row import Row


@dataclasses.dataclass(frozen=True)
class Said:
    """What a row says, before anything is shown in a template.

    prompt: a text as it is, or turns. chosen, rejected: texts with a text, assistant turns with turns. plain: prompt
    and replies as the source itself writes the dialogue in HH's form. tools: JSON, or "". good: of a single reply with
    a label, whether it is a good one. more: further pairs of the same row."""

    prompt: str | tuple[Turn, ...]
    chosen: str | Turn | None = None
    rejected: str | Turn | None = None
    confidence: float | None = None
    margin: float | None = None
    plain: tuple[str, ...] = ()
    tools: str = ""
    good: bool | None = None
    more: "tuple[Said, ...]" = ()


@dataclasses.dataclass
class Plan:
    """How the rows of one file are read. uses: column → what it is used as. known: columns left on purpose. notes: what
    else is to be said; it grows while rows are read. coding: how the values of a choice column were understood, which
    must be the same in all files; "" where they leave no doubt."""

    read: Callable[[Row], Said]
    uses: dict[str, str]
    known: frozenset[str] = frozenset()
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    coding: str = ""

    def note(self, what: str, count: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + count


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of rows: its name, its columns in words, whether a file is of it, and how such a file is read. replies:
    whether its rows hold any."""

    name: str
    columns: str
    matches: Callable[[Survey, Sequence[Row]], bool]
    plan: Callable[[Survey, Sequence[Row], Reading], Plan]
    replies: bool = True
