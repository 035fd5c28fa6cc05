"""Rows with a prompt beside it, and one reply, a chosen and a rejected one, or none, enter; what they say leaves.

Prompts and replies may be text, message objects or lists of messages, and lists may repeat the prompt.
"""

from collections.abc import Mapping, Sequence

from mpo_jax.data.chat import hh_turns, is_whole_dialogue, messages, split_hh
from mpo_jax.data.columns import Survey, words
from mpo_jax.data.forms import prompts
from mpo_jax.data.forms.base import Form, Plan, Said
from mpo_jax.data.forms.prompts import Head
from mpo_jax.data.reading import Reading
from mpo_jax.data.records import Turn
from mpo_jax.data.row import Drop, Row, is_list

DEMONSTRATIONS = ("completion", "response", "output", "answer", "reply")
_RATINGS = {"score", "scores", "rating", "ratings", "reward", "rewards"}


# Which columns --------------------------------------------------------------------------------------------------------


def rating_columns(found: Survey) -> tuple[str, str] | None:
    """The columns that rate the chosen and the rejected reply: `score_chosen`, `chosen_rating`, `chosen-avg-rating`."""
    sides: dict[str, dict[tuple[str, ...], str]] = {"chosen": {}, "rejected": {}}
    for name in found.kinds:
        parts = words(name)
        for side, by_rest in sides.items():
            if side in parts and _RATINGS & set(parts) and set(parts) <= {side, "avg", "overall", "mean", *_RATINGS}:
                by_rest[tuple(part for part in parts if part != side)] = name
    for rest, chosen in sides["chosen"].items():
        if found.has(chosen, sides["rejected"].get(rest, "")):
            return chosen, sides["rejected"][rest]
    return None


def margin_of(found: Survey):
    """(how a row's margin is read, the columns used): `margin`, or the difference of the two ratings."""
    ratings = rating_columns(found)
    if found.has("margin"):
        uses = {"margin": "margin"} | (
            dict.fromkeys(ratings, "unread, since there is a column margin") if ratings else {}
        )
        return lambda row: row.number("margin"), uses
    if ratings is None:
        return lambda row: None, {}

    def difference(row: Row) -> float | None:
        better, worse = (row.number(name) for name in ratings)
        return None if better is None or worse is None else better - worse

    return difference, dict(zip(ratings, ("margin (minus the other rating)", "margin (subtracted)"), strict=True))


def _structured(found: Survey, *names: str) -> bool:
    return any(found.holds(name, "list", "object") for name in names)


# Reading --------------------------------------------------------------------------------------------------------------


def reply_plan(found: Survey, rows: Sequence[Row], reading: Reading, names: tuple[str, ...]) -> Plan:
    """How rows with a prompt and the reply columns `names` are read."""
    head = prompts.find(found, reading) or prompts.beside(found)
    margin, margin_uses = margin_of(found) if len(names) == 2 else (lambda row: None, {})
    confidence = len(names) == 2 and found.holds("confidence", "number", "text")
    uses = (head.uses() if head else {}) | dict(zip(names, ("chosen", "rejected"), strict=False)) | margin_uses
    uses |= {"confidence": "confidence"} if confidence else {}
    repeated = head is not None and bool(names) and _prompt_is_repeated(rows, head, names)
    asked = head is not None and (
        head.asked or _structured(found, head.column, *names) or head.column in prompts.CONVERSATIONS
    )

    def read(row: Row) -> Said:
        prompt, sides = read_sides(row, head, names)
        own = row.values.get(head.column) if repeated and head else None
        if isinstance(own, str) and all(isinstance(side, str) and side.startswith(own) for side in sides):
            sides = [side[len(own) :] for side in sides]
            plan.note("prompts that both replies repeated, removed from them")
        if isinstance(prompt, str):
            turns = prompts.dialogue(prompt)
            if asked or turns:
                plain = (prompt, *map(_text, sides)) if turns and not asked else ()
                turns = turns or ((Turn("user", prompt),) if prompt.strip() else ())
                return _said(row, turns, [_turn(side) for side in sides], plain)
            return _said(row, prompt, [_text(side) for side in sides])
        return _said(row, prompts.ends_with_question(prompt), [_turn(side) for side in sides])

    def _said(row: Row, prompt, sides, plain=()) -> Said:
        chosen, rejected = (*sides, None, None)[:2]
        number = row.number("confidence") if confidence else None
        tools = head.tool_list(row) if head else ""
        return Said(prompt, chosen, rejected, number, margin(row), plain, tools)

    plan = Plan(read, uses)
    return plan


def read_sides(row: Row, head: Head | None, names: tuple[str, ...]) -> tuple:
    """(prompt, replies) of a row; replies that are message lists may hold the prompt, or repeat it."""
    values = [row.values.get(name) for name in names]
    if head is not None and values and all(is_whole_dialogue(value) for value in values):
        sides = [split_hh(str(value)) for value in values]
        wholes = [_whole(row, head, (*hh_turns(prompt), Turn("assistant", reply.strip()))) for prompt, reply in sides]
        return _one_prompt(wholes)
    if not any(is_list(value) or isinstance(value, Mapping) for value in values):
        texts = [row.text(name) for name in names]  # all columns, before a rule may drop the row
        return _prompt(row, head), texts
    lists = [
        (Turn("assistant", value),) if isinstance(value, str) else messages(row, name)
        for name, value in zip(names, values, strict=True)
    ]
    if any(not side or side[-1].role != "assistant" for side in lists):
        raise Drop("last turn is not the assistant's")
    if any(len(side) > 1 for side in lists):
        wholes = [_whole(row, head, side) for side in lists]
    else:
        given = _prompt(row, head) if head else ()
        if isinstance(given, str):
            given = prompts.dialogue(given) or ((Turn("user", given),) if given.strip() else ())
        wholes = [(*given, *side) for side in lists]
    return _one_prompt(wholes)


def _one_prompt(wholes: Sequence[tuple[Turn, ...]]) -> tuple:
    """(prompt, replies) of conversations. Drop where they differ before their last turn."""
    if len({side[:-1] for side in wholes}) > 1:
        raise Drop("prompts differ")
    return wholes[0][:-1], [side[-1] for side in wholes]


def _prompt(row: Row, head: Head | None) -> str | tuple[Turn, ...]:
    if head is None or not head.column:
        raise Drop("empty prompt")
    return head.turns(row)


def _whole(row: Row, head: Head | None, side: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A conversation from a reply column that holds several turns: it repeats the prompt, or goes on from it."""
    if head is None:
        return side
    before = head.before(row)
    if row.values.get(head.column) is None:
        return (*_lead(before, side), *side)
    given = head.turns(row)
    if isinstance(given, str):
        given = prompts.dialogue(given) or (Turn("user", given),)
    said = given[len(before) :] if given[: len(before)] == before else given
    bare = tuple(turn for turn in side if turn.role != "system")
    lead = _lead(before, side)
    spoken = tuple(turn for turn in said if turn.role != "system")
    if [_key(turn) for turn in bare[: len(spoken)]] == [_key(turn) for turn in spoken]:
        kept = said if not any(turn.role == "system" for turn in side) else side[: len(side) - len(bare)] + spoken
        return (*lead, *kept, *bare[len(spoken) :])
    asked = [_key(turn) for turn in bare if turn.role == "user"]
    if bare[0].role == "user" and len(spoken) == 1 and spoken[0].role == "user":
        if asked[-1] != _key(spoken[0]):  # the prompt column is neither the conversation's first turn nor its last
            raise Drop("the prompt column and the conversation differ")
        return (*lead, *side)
    return (*given, *side)


def _lead(before: tuple[Turn, ...], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """What the columns beside a conversation put before it: nothing where it has a system text itself, the same."""
    said = [turn.content.strip() for turn in turns if turn.role == "system"]
    given = [turn.content.strip() for turn in before if turn.role == "system"]
    if said and given and said != given:
        raise Drop("the system column and the conversation differ")
    return before if turns[: len(before)] != before and not said else ()


def _key(turn: Turn) -> tuple[str, str]:
    return turn.role, turn.content.strip()


def _text(side: str | Turn) -> str:
    return side if isinstance(side, str) else side.content


def _turn(side: str | Turn) -> Turn:
    """A reply as a turn; the white space around a text belongs to the form in which it stood."""
    return Turn("assistant", side.strip()) if isinstance(side, str) else side


def _prompt_is_repeated(rows: Sequence[Row], head: Head, names: tuple[str, ...]) -> bool:
    """Whether the replies begin with the prompt's own text, in most rows that have one: then it is no part of them. One
    row or two may do so by chance, all do only where a source wrote them so."""
    whole = repeats = 0
    for row in rows:
        prompt, sides = row.values.get(head.column), [row.values.get(name) for name in names]
        if isinstance(prompt, str) and prompt.strip() and all(isinstance(side, str) for side in sides):
            whole += 1
            repeats += all(str(side).startswith(prompt) and len(str(side)) > len(prompt) for side in sides)
    return whole > 0 and repeats > whole / 2


# Forms ----------------------------------------------------------------------------------------------------------------


def _pair(found: Survey, rows, reading: Reading) -> Plan:
    return reply_plan(found, rows, reading, ("chosen", "rejected"))


def _one_reply(found: Survey) -> str | None:
    if found.has("chosen"):
        return "chosen"
    name = next((name for name in DEMONSTRATIONS if found.holds(name, "text", "list", "object")), None)
    return name or ("label" if found.kinds.get("label") == {"text"} else None)


def _demonstration(found: Survey, rows, reading: Reading) -> Plan:
    name = _one_reply(found)
    assert name is not None
    return reply_plan(found, rows, reading, (name,))


def _labelled(found: Survey, rows, reading: Reading) -> Plan:
    """Single replies with a label: KTO's form."""
    name = next(name for name in DEMONSTRATIONS if found.has(name))
    plan = reply_plan(found, rows, reading, (name,))
    read = plan.read

    def with_label(row: Row) -> Said:
        label = row.values.get("label")
        if label is None:
            raise Drop("no 'label' (missing or null, expected true or false)")
        label = _LABELS.get(label.strip().lower(), label) if isinstance(label, str) else label
        if not isinstance(label, bool) and label not in (0, 1):
            row.get("label", bool)
        said = read(row)
        return Said(said.prompt, said.chosen, None, plain=said.plain, tools=said.tools, good=bool(label))

    return Plan(with_label, plan.uses | {"label": "whether the reply is good"}, plan.known, plan.notes)


def _conversation(found: Survey, rows, reading: Reading) -> Plan:
    """Whole conversations: the last turn of the assistant is the reply, all before it the prompt."""
    head = prompts.find(found, reading)
    column = found.first_of(prompts.CONVERSATIONS)
    assert column is not None
    system, tools = found.has("system"), found.has("tools")
    uses = {column: "prompt and reply"} | ({"system": "system turn"} if system else {})
    uses |= {"tools": "tools of the template"} if tools else {}
    head = Head(column, "", True, system, False, tools)
    asked = _first_question(found, rows, column)
    uses |= {asked: "the first turn, which the conversation repeats"} if asked else {}

    def read(row: Row) -> Said:
        turns = messages(row, column)
        turns = (*_lead(head.before(row), turns), *turns)
        reply = turns[-1] if turns and turns[-1].role == "assistant" else None
        prompt = prompts.ends_with_question(turns[:-1] if reply else turns)
        return Said(prompt, reply, tools=head.tool_list(row))

    return Plan(read, uses)


def _first_question(found: Survey, rows: Sequence[Row], column: str) -> str | None:
    """A prompt column that only repeats what the user says first in the conversations."""

    def repeats(row: Row) -> bool:
        text = row.values.get("prompt")
        if not text:
            return True
        said = [turn.content.strip() for turn in messages(row, column) if turn.role == "user"]
        return isinstance(text, str) and said[:1] == [text.strip()]

    return "prompt" if found.has("prompt") and all(repeats(row) for row in rows if row.values.get(column)) else None


def _prompt_alone(found: Survey, rows, reading: Reading) -> Plan:
    return reply_plan(found, rows, reading, ())


def has_head(found: Survey) -> bool:
    return found.first_of(("prompt", *prompts.CONVERSATIONS, *prompts.QUESTIONS)) is not None


_LABELS = {"true": True, "false": False, "1": True, "0": False}
"""Labels as a table without types has them."""


def _is_label(found: Survey, rows: Sequence[Row]) -> bool:
    kinds = found.kinds.get("label", frozenset())
    if kinds == {"text"}:
        said = (row.values.get("label") for row in rows)
        return all(value is None or str(value).strip().lower() in _LABELS for value in said)
    return bool(kinds) and kinds <= {"bool", "number"}


FORMS = (
    Form(
        "sharegpt",
        "conversations/chosen/rejected",
        lambda s, rows: s.has("conversations", "chosen", "rejected"),
        _pair,
    ),
    Form(
        "chat",
        "chosen/rejected as message lists",
        lambda s, rows: s.has("chosen", "rejected") and _structured(s, "chosen", "rejected"),
        _pair,
    ),
    Form(
        "pair",
        "prompt/chosen/rejected (or question, instruction + input, messages for prompt)",
        lambda s, rows: s.has("chosen", "rejected") and has_head(s),
        _pair,
    ),
    Form(
        "unpaired",
        "prompt/completion/label",
        lambda s, rows: (
            _is_label(s, rows) and has_head(s) and any(s.has(name) for name in DEMONSTRATIONS) and not s.has("chosen")
        ),
        _labelled,
    ),
    Form(
        "completion",
        "prompt/completion (or response, output, answer)",
        lambda s, rows: has_head(s) and not s.has("chosen") and not s.has("rejected") and _one_reply(s) is not None,
        _demonstration,
    ),
    Form(
        "chosen",
        "prompt/chosen",
        lambda s, rows: has_head(s) and s.has("chosen") and not s.has("rejected"),
        _demonstration,
    ),
    Form(
        "messages",
        "messages or conversations",
        lambda s, rows: any(_structured(s, name) for name in prompts.CONVERSATIONS) and not s.has("rejected"),
        _conversation,
    ),
    Form(
        "prompt",
        "prompt",
        lambda s, rows: has_head(s) and not s.has("chosen") and not s.has("rejected"),
        _prompt_alone,
        replies=False,
    ),
)


def no_prompt_plan(found: Survey, uses: dict[str, str], read) -> Plan:
    """Of pairs whose prompt stands in the replies themselves: `read` gives it; margins and confidence are added."""
    margin, margin_uses = margin_of(found)
    confidence = found.holds("confidence", "number", "text")

    def with_numbers(row: Row) -> Said:
        said = read(row)
        number = row.number("confidence") if confidence else None
        return Said(said.prompt, said.chosen, said.rejected, number, margin(row), said.plain)

    return Plan(with_numbers, uses | margin_uses | ({"confidence": "confidence"} if confidence else {}))
