"""Columns that no form knows enter; what each of them probably is leaves, as flags that say so.

A guess by names and by the kinds of values; it is told to a person, and nothing is read by it.
"""

import re
import shlex
from collections.abc import Iterable

from mpo_jax.data.columns import Survey, is_meaningful, words

_PROMPT = (
    "prompt", "question", "instruction", "query", "ask", "request", "problem", "user", "messages", "conversation",
    "dialogue", "post", "context", "input",
)  # fmt: skip
_GOOD = {"chosen", "good", "better", "best", "preferred", "winner", "accepted", "positive", "pos", "correct", "liked"}
_BAD = {
    "rejected", "bad", "worse", "worst", "dispreferred", "loser", "negative", "neg", "incorrect", "wrong", "disliked",
    "non", "not",
}  # fmt: skip
_REPLY = (
    "completion", "response", "answer", "reply", "output", "target", "solution", "assistant", "generation", "text",
)  # fmt: skip
_CHOICE = {"choice", "winner", "better", "best", "preferred", "preference", "label"}
_ONE_SIDE = {"tie", "a", "b", "0", "1", "2", "first", "second", "left", "right"}
_SIDES = (("a", "b"), ("1", "2"), ("0", "1"), ("first", "second"), ("left", "right"))


def flags(found: Survey) -> str:
    """The flags of `columns`, or "" where names tell too little."""
    named = {role: name for role, name in columns(found).items() if role != name}
    return " ".join(f"--config.data.columns.{role}={shlex.quote(name)}" for role, name in named.items())


def hint(found: Survey) -> str:
    """The end of an error about columns: the flags, where there is a guess."""
    guess = flags(found)
    return f"; perhaps {guess}" if guess else ""


def of_one_side(column: str) -> bool:
    """Whether a column tells of one of two replies alone, as `winner_model_a`: a 1 there does not mean "the second"."""
    return len(_ONE_SIDE & set(words(column))) == 1


def columns(found: Survey) -> dict[str, str]:
    """Role -> column: of a pair, of two replies and a choice, or of one reply with a label or without; {} for none."""
    texts = [name for name in found.kinds if found.holds(name, "text", "list", "object")]
    good = _first(texts, lambda name: _GOOD & set(words(name)) and not _BAD & set(words(name)))
    bad = _first(texts, lambda name: bool(_BAD & set(words(name))))
    if good and bad:
        return _with_prompt(texts, {"chosen": good, "rejected": bad})
    for one, other, stem in _sides(texts):
        others = [name for name in found.kinds if name not in (one, other)]
        choice = _first(others, lambda name: bool(_CHOICE & set(words(name))) and not of_one_side(name))
        if stem and choice:
            return _with_prompt(texts, {"first": one, "second": other, "choice": choice})
        if stem:  # two replies of which nothing says the better
            return {}
    reply = _by_word(texts, _REPLY)
    if not reply:
        return {}
    label = _first(found.kinds, lambda name: found.kinds[name] <= {"bool", "number"} and is_meaningful(name))
    return _with_prompt(texts, {"completion": reply} | ({"label": label} if label else {}))


def _with_prompt(texts: list[str], replies: dict[str, str]) -> dict[str, str]:
    """With the column of the prompt, where one is left."""
    prompt = _by_word([name for name in texts if name not in replies.values()], _PROMPT)
    return ({"prompt": prompt} if prompt else {}) | replies


def _sides(texts: list[str]) -> Iterable[tuple[str, str, str]]:
    """Columns whose names differ in their side alone (`reply_a`, `reply_b`), with what they have in common."""
    for one_side, other_side in _SIDES:
        for one in texts:
            stem = re.sub(rf"(?:^|[_\- ]){one_side}$", "", one, flags=re.IGNORECASE)
            other = next((name for name in texts if name.lower() == one.lower()[: -len(one_side)] + other_side), None)
            if stem != one and other is not None:
                yield one, other, stem


def _by_word(names: Iterable[str], known: tuple[str, ...]) -> str | None:
    """The column with the first of the known words that any has."""
    names = list(names)
    return next((name for word in known for name in names if word in words(name)), None)


def _first(names: Iterable[str], fits) -> str | None:
    return next((name for name in names if fits(name)), None)
