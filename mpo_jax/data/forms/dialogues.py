"""Pairs without a prompt column enter: both replies hold it, as a dialogue in HH's form, or as a text in common."""

import itertools
import re
from collections.abc import Sequence

from mpo_jax.data.chat import ASSISTANT, HUMAN, hh_turns, split_hh
from mpo_jax.data.columns import Survey
from mpo_jax.data.forms.base import Form, Plan, Said
from mpo_jax.data.forms.replies import has_head, no_prompt_plan
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import Turn
from mpo_jax.data.row import Drop, Row
from mpo_jax.errors import InputError

_USES = {"chosen": "prompt and chosen", "rejected": "prompt and rejected"}


def _read_dialogue(row: Row) -> Said:
    sides = row.text("chosen"), row.text("rejected")  # both columns, before a rule may drop the row
    (prompt, chosen), (other, rejected) = (split_hh(side) for side in sides)
    if prompt != other:
        raise Drop("prompts differ")
    return _said(prompt, chosen, rejected)


def _said(prompt: str, chosen: str, rejected: str) -> Said:
    one, other = (Turn("assistant", text.strip()) for text in (chosen, rejected))
    return Said(hh_turns(prompt), one, other, plain=(prompt, chosen, rejected))


def _common(found: Survey, rows, reading: Reading) -> Plan:
    if not reading.common_prompt:
        where = found.first.get("chosen", rows[0].where)
        raise InputError(
            f"{where}: columns 'chosen' and 'rejected' without a prompt column, and no dialogues in HH's form; name "
            "the prompt's column, data.columns.prompt='NAME', or take the beginning that both replies have in common "
            "for it, data.common_prompt=True"
        )

    def read(row: Row) -> Said:
        chosen, rejected = row.text("chosen"), row.text("rejected")
        prompt = common_beginning(chosen, rejected)
        if not prompt.strip():
            raise Drop("no beginning in common")
        plan.note("prompts taken from the replies' common beginning")
        return Said(prompt, chosen[len(prompt) :], rejected[len(prompt) :])

    plan = no_prompt_plan(found, _USES, read)
    return plan


def common_beginning(one: str, other: str) -> str:
    """What two texts begin with, up to the end of its last turn mark (`Assistant:`) or else of its last whole word."""
    alike = (a == b for a, b in zip(one, other, strict=False))
    shared = one[: sum(itertools.takewhile(bool, alike))]
    turn = max(shared.rfind(mark) for mark in ("\nAssistant:", "\nASSISTANT:", "\nA:"))
    if turn >= 0:
        return shared[: shared.index(":", turn) + 1]
    if shared in (one, other):  # one is the beginning of the other: its last word stays the reply
        shared = shared.rstrip()
    found = list(re.finditer(r"\s", shared))
    return shared[: found[-1].start()].rstrip() if found else ""


def _has_dialogues(found: Survey, rows: Sequence[Row]) -> bool:
    if not (found.has("chosen", "rejected") and not has_head(found)):
        return False
    values = (row.values.get(name) for row in rows for name in ("chosen", "rejected"))
    return any(ASSISTANT in _text(value) or HUMAN in _text(value) for value in values)


def _text(value) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


FORMS = (
    Form(
        "hh",
        "chosen/rejected as dialogues",
        _has_dialogues,
        lambda s, rows, reading: no_prompt_plan(s, _USES, _read_dialogue),
    ),
    Form(
        "common",
        "chosen/rejected with a common beginning (data.common_prompt)",
        lambda s, rows: s.has("chosen", "rejected") and not has_head(s),
        _common,
    ),
)
