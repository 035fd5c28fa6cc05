"""Replies to compare enter; questions for a judge leave, and what its answers say: first, second, tie, or nothing.

A prompt file is a Jinja template of the whole message, with `prompt`, `first` and `second`; the judge is to end with a
line "Verdict: A", "Verdict: B" or "Verdict: tie".
"""

import dataclasses
import hashlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
from etils import epath

from mpo_jax.errors import InputError

PROMPTS = ("summary", "helpful", "harmless")
"""The prompt files that come with the package."""

FIRST, SECOND, TIE = "first", "second", "tie"
_VERDICT = re.compile(r"^[\W_]*verdict[\W_]*\b(A|B|tie)\b[\W_]*$", re.IGNORECASE | re.MULTILINE)
_MEANING = {"a": FIRST, "b": SECOND, "tie": TIE}


@dataclasses.dataclass(frozen=True)
class Question:
    """One comparison in one order. first: the policy whose reply is shown as A, `left` or `right`. text: the whole
    message."""

    prompt_id: int
    left: str
    right: str
    first: str
    text: str


def version(name: str) -> str:
    """What a prompt is known by: the hash of its text. InputError where there is none."""
    return hashlib.sha256(_source(name).encode()).hexdigest()[:12]


def load(name: str) -> jinja2.Template:
    """One of `PROMPTS`, or a file. InputError for a file that is missing, broken, or leaves out one of the three."""
    source = _source(name)
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False
    )
    marks = {key: f"<<{key}>>" for key in ("prompt", "first", "second")}
    try:
        template = environment.from_string(source)
        shown = template.render(**marks)
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InputError(f"judge prompt {name}{line}: {error}") from error
    for key, mark in marks.items():
        if mark not in shown:
            raise InputError(f"judge prompt {name}: it does not show {{{{ {key} }}}}")
    return template


def _source(name: str) -> str:
    """The text of one of `PROMPTS`, or of a file."""
    if name in PROMPTS:
        return importlib.resources.files("mpo_jax.evaluation").joinpath("prompts", f"{name}.jinja").read_text("utf-8")
    if not epath.Path(name).is_file():
        raise InputError(f"judge prompt {name!r}: no such file, nor one of {', '.join(PROMPTS)}")
    try:
        return epath.Path(name).read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"judge prompt {name}: not UTF-8 at byte {error.start}") from error


def questions(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]], template: jinja2.Template
) -> list[Question]:
    """Both orders of every pair of policies on every prompt, except where the two replies are the same text.

    rows: lines of replies.jsonl.
    """
    found = []
    for row in rows:
        texts = {name: reply["text"] for name, reply in row["replies"].items()}
        for left, right in pairs:
            if texts[left] == texts[right]:
                continue
            for first, second in ((left, right), (right, left)):
                text = template.render(prompt=row["prompt"], first=texts[first], second=texts[second])
                found.append(Question(row["prompt_id"], left, right, first, text))
    return found


def verdict(answer: str | None) -> str | None:
    """FIRST, SECOND or TIE; None where the answer has no verdict line or several that differ: never a guess."""
    found = {_MEANING[word.lower()] for word in _VERDICT.findall(answer or "")}
    return found.pop() if len(found) == 1 else None
