"""Rows with several replies and a judgment enter (which of two is better, or a rank of each); pairs leave.

Published data sets are known by their columns; for others `data.columns` names first, second and choice.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mpo_jax.data.chat import messages
from mpo_jax.data.columns import Survey
from mpo_jax.data.forms import prompts
from mpo_jax.data.forms.base import Form, Plan, Said
from mpo_jax.data.forms.prompts import Head
from mpo_jax.data.forms.replies import read_sides
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import Turn
from mpo_jax.data.row import Drop, Row, is_empty, is_list, is_null, kind_of
from mpo_jax.data.suggest import of_one_side
from mpo_jax.errors import InputError

Choose = Callable[[Row, str], tuple[int, float | None]]
"""(row, column) → (0 if the first reply is better, 1 if the second; by how much). Drop for a tie."""


# Two replies ----------------------------------------------------------------------------------------------------------


def _index(row: Row, column: str) -> tuple[int, None]:
    """0 or 1: which is better (PKU-SafeRLHF)."""
    value = _needed(row, column)
    if isinstance(value, bool) or value not in (0, 1):
        raise InputError(f"{row.where}: key {column!r} is {kind_of(value)}, expected 0 or 1")
    return int(value), None


def _strength(row: Row, column: str) -> tuple[int, float]:
    """Below 0: the first is better, by so much; 0: a tie (HelpSteer2's preferences)."""
    value = row.number(column)
    if value is None:
        raise Drop(f"no {column!r} (missing or null, expected a number)")
    if value == 0:
        raise Drop("tie")
    return int(value > 0), abs(value)


def _first_is_better(row: Row, column: str) -> tuple[int, None]:
    """1: the first is better, 0: the second (SHP)."""
    chosen, _ = _index(row, column)
    return 1 - chosen, None


def _one_or_two(row: Row, column: str) -> tuple[int, None]:
    """1 or 2: which is better (AlpacaFarm)."""
    value = _needed(row, column)
    if isinstance(value, bool) or value not in (1, 2):
        raise InputError(f"{row.where}: key {column!r} is {kind_of(value)}, expected 1 or 2")
    return int(value) - 1, None


def _needed(row: Row, column: str):
    value = row.values.get(column)
    if is_null(value):
        raise Drop(f"no {column!r} (missing or null)")
    return _whole_number(value)


def _whole_number(value: Any) -> Any:
    """A whole number that is written as text, as a table without types has it; any other value as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", value) else value


_NAMES = ({"a", "first", "model_a", "left", "chosen_a"}, {"b", "second", "model_b", "right", "chosen_b"})


def _mapped(found: Survey, rows: Sequence[Row], reading: Reading) -> Choose:
    """The meaning of a choice column that `data.columns` names, by all its values: 0 and 1, 1 and 2, below and above
    0, or names."""
    column = reading.columns.get("choice", "choice")
    where = found.first.get("choice", rows[0].where)
    values = [_whole_number(row.values.get("choice")) for row in rows]
    numbers = {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
    if numbers and of_one_side(column):
        raise InputError(
            f"{where}: column {column!r} tells of one reply alone, so its numbers do not say which of two is better; "
            "expected a column that does: 0 or 1, 1 or 2, below or above 0, or a name"
        )
    if any(number < 0 for number in numbers):
        return _strength
    if numbers == {1}:
        raise InputError(
            f"{where}: column {column!r} holds only 1 in this file, which may be of 0 and 1 or of 1 and 2; "
            "expected both values in every file (data.limit may cut them off), or names"
        )
    if numbers and numbers <= {0, 1}:
        return _index
    if numbers and numbers <= {1, 2}:
        return _one_or_two
    if numbers:
        told = ", ".join(map(str, sorted(numbers)[:5])) + ", ..." * (len(numbers) > 5)
        raise InputError(
            f"{where}: column {column!r} holds {told}; expected 0 and 1 alone, 1 and 2 alone, numbers below and above "
            "0 (0 is a tie), or names (and 'tie')"
        )
    own = [reading.columns.get(name, name).lower() for name in ("first", "second")]

    def by_name(row: Row, column: str) -> tuple[int, None]:
        value = str(_needed(row, column)).strip().lower()
        for place, names in enumerate(_NAMES):
            if value in names or value == own[place]:
                return place, None
        if value.startswith("tie") or value in ("both", "neither", "equal"):
            raise Drop("tie")
        raise InputError(
            f"{row.where}: key 'choice' is {row.values[column]!r}; expected 0 or 1, 1 or 2, 'a' or 'b', or the name of "
            "a reply's column"
        )

    return by_name


def _two(
    name: str,
    prompt: str,
    replies: tuple[str, str],
    choice: str,
    choose: Choose | None,
    known: tuple[str, ...] = (),
    scores: tuple[str, str] | None = None,
) -> Form:
    """A form of two replies and a choice. scores: columns that rate the two; their difference is the margin."""

    def matches(found: Survey, rows) -> bool:
        return found.has(*replies, choice) and not found.has("chosen", "rejected")

    def plan(found: Survey, rows, reading: Reading) -> Plan:
        system = found.has("system")
        head = prompts.find(found, reading) if prompt == "prompt" else Head(prompt, "", True, system, False, False)
        whole = head is None and all(found.kinds.get(name) == {"list"} for name in replies)
        if whole:  # each reply is its whole conversation, prompt and all
            head = prompts.beside(found) or Head("", "", True, False, False, False)
        if head is None:
            raise InputError(
                f"{found.first.get(choice, rows[0].where)}: no prompt column; name it, data.columns.prompt='NAME'"
            )
        rule = choose or _mapped(found, rows, reading)
        rated = scores is not None and found.has(*scores)

        def read(row: Row) -> Said:
            asked, sides = read_sides(row, head, replies) if whole else (None, [_reply(row, each) for each in replies])
            better, margin = rule(row, choice)
            given = [row.number(column) for column in scores] if rated and scores else []
            if given and None not in given:
                margin = (given[better] or 0.0) - (given[1 - better] or 0.0)
            return Said(
                prompts.ends_with_question(asked if whole else _asked(head.turns(row))),
                sides[better],
                sides[1 - better],
                margin=margin,
                tools=head.tool_list(row),
            )

        uses = head.uses() | dict.fromkeys(replies, "a reply") | {choice: "which is chosen"}
        uses |= dict.fromkeys(scores, "margin") if rated and scores else {}
        return Plan(read, uses, frozenset(known), coding="" if choose else rule.__name__)

    return Form(name, f"{prompt}/{'/'.join(replies)}/{choice}", matches, plan)


def _asked(prompt: str | tuple[Turn, ...]) -> tuple[Turn, ...]:
    if not isinstance(prompt, str):
        return prompt
    return prompts.dialogue(prompt) or ((Turn("user", prompt),) if prompt.strip() else ())


def _reply(row: Row, column: str) -> Turn:
    value = row.values.get(column)
    if is_list(value) or isinstance(value, Mapping):
        turns = messages(row, column)
        if not turns or turns[-1].role != "assistant":
            raise Drop("last turn is not the assistant's")
        return turns[-1]
    return Turn("assistant", row.text(column).strip())


# Ranked replies -------------------------------------------------------------------------------------------------------


_LISTS = ("answers", "completions", "responses", "candidates", "replies", "outputs")
_BODIES = ("answer", "text", "response", "completion", "content", "output")
_RANKS = ("rank", "ranking")
_SCORES = ("score", "overall_score", "rating", "pm_score", "reward")


def _ranked_column(found: Survey, rows: Sequence[Row]) -> str | None:
    for name in _LISTS:
        if found.holds(name, "list") and any(_is_ranked(row.values.get(name)) for row in rows):
            return name
    return None


def _is_ranked(value: Any) -> bool:
    return (
        is_list(value)
        and bool(value)
        and all(isinstance(entry, Mapping) for entry in value)
        and any(name in value[0] for name in _BODIES)
        and any(name in value[0] for name in (*_RANKS, *_SCORES))
    )


def _ranked(found: Survey, rows: Sequence[Row], reading: Reading) -> Plan:
    """Replies with ranks (1 is best) or scores, paired as `data.ranked` says: the better is chosen."""
    column, head = _ranked_column(found, rows), prompts.find(found, reading)
    assert column is not None and head is not None

    def read(row: Row) -> Said:
        entries = [Row(entry, f"{row.where}, {column}[{n}]") for n, entry in enumerate(row.get(column, list))]
        if len(entries) < 2:
            raise Drop("fewer than two replies")
        graded = sorted(((_grade(entry), place) for place, entry in enumerate(entries)), key=lambda pair: pair[0])
        if graded[0][0] == graded[-1][0]:
            raise Drop("tie")
        if len(entries) > 2 and reading.ranked == "best_worst":
            plan.note("replies between the best and the worst, unread", len(entries) - 2)
        prompt = prompts.ends_with_question(_asked(head.turns(row)))
        said = []
        for (low, worse), (high, better) in _paired(graded, reading.ranked):
            if low == high:
                plan.note("pairs of replies of equal rank, left out")
                continue
            chosen, rejected = (
                Turn("assistant", entries[at].text(_body(entries[at])).strip()) for at in (better, worse)
            )
            said.append(Said(prompt, chosen, rejected))
        return dataclasses.replace(said[0], more=tuple(said[1:]))

    plan = Plan(read, head.uses() | {column: f"replies: {_PAIRED[reading.ranked]}"}, frozenset(_KNOWN_RANKED))
    return plan


_PAIRED = {
    "best_worst": "the best chosen, the worst rejected",
    "all": "every two, the better chosen",
    "adjacent": "each with the next in rank, the better chosen",
}


def _paired(graded: Sequence[Any], ranked: str) -> Iterable[tuple[Any, Any]]:
    """The pairs (worse, better) of replies in ascending order."""
    if ranked == "all":
        return itertools.combinations(graded, 2)
    return itertools.pairwise(graded) if ranked == "adjacent" else [(graded[0], graded[-1])]


_KNOWN_RANKED = ("turns", "num_responses", "good_natured", "correct_answers", "incorrect_answers")


def _body(entry: Row) -> str:
    return next((name for name in _BODIES if not is_empty(entry.values.get(name))), _BODIES[0])


def _grade(entry: Row) -> float:
    """Higher is better."""
    for names, sign in ((_RANKS, -1.0), (_SCORES, 1.0)):
        for name in names:
            if (value := entry.number(name)) is not None:
                return sign * value
    raise InputError(f"{entry.where}: no rank and no score; expected one of {', '.join((*_RANKS, *_SCORES))}")


_PKU = tuple(
    f"{stem}{n}{rest}"
    for n in (0, 1)
    for stem, rest in (
        ("is_response_", "_safe"), ("response_", "_source"), ("response_", "_harm_category"),
        ("response_", "_severity_level"), ("response_", "_sha256"),
    )
)  # fmt: skip
FORMS = (
    _two("choice", "prompt", ("first", "second"), "choice", None),
    _two(
        "pku_safe_rlhf",
        "prompt",
        ("response_0", "response_1"),
        "better_response_id",
        _index,
        (*_PKU, "safer_response_id", "prompt_source"),
    ),
    _two(
        "helpsteer_preference",
        "prompt",
        ("response_1", "response_2"),
        "preference_strength",
        _strength,
        (
            "preference_statement",
            "preference_elaboration",
            "three_most_similar_preferences",
            "all_preferences_unprocessed",
        ),
    ),
    _two(
        "shp",
        "history",
        ("human_ref_A", "human_ref_B"),
        "labels",
        _first_is_better,
        ("score_ratio",),
        ("score_A", "score_B"),
    ),
    _two("alpaca_farm", "prompt", ("output_1", "output_2"), "preference", _one_or_two),
    Form(
        "ranked",
        "prompt/answers with ranks or scores",
        lambda s, rows: prompts.find(s, Reading()) is not None and _ranked_column(s, rows) is not None,
        _ranked,
    ),
)
