"""Policies' scored replies to the same prompts enter; whether one policy is better than each of the others leaves, in
numbers and in words."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpo_jax.evaluation import statistics

LEVEL = 0.05
"""The corrected p-value below which a difference counts as found."""

Row = Mapping[str, Any]
"""A line of an evaluation's replies: {"replies": {policy: {"gold", "reward", ...}}}."""


def subject(policies: Sequence[str], rests_on: Mapping[str, frozenset[str]]) -> str:
    """The policy whose verdict is asked for: the one that rests on the most of the others, as a policy of several
    trainings rests on that of each; of several such, the first. rests_on: policy -> all stages beneath it."""
    return max(policies, key=lambda name: len(rests_on[name] & set(policies)))


def given(rows: Sequence[Row], name: str, policies: Mapping[str, Mapping[str, Any]], baseline: str) -> Any:
    """The verdict on the policy `name`, as plain data; None where there is nothing to compare it with.

    By the gold labeller's score where there is one, or else the reward model's, on the prompts whose replies all have
    one. Every p-value is corrected (Holm) over all of the verdict's: a difference of score and a win rate for each
    other policy. policies: those that are compared, each with its means, for the KL to `baseline`.
    """
    key, by = next(((key, by) for key, by in statistics.JUDGES if _scored(rows, key, policies)), ("", ""))
    scored = _scored(rows, key, policies) if key else []
    others = [other for other in policies if other != name]
    if len(scored) < 2 or not others:
        return None
    own = [row["replies"][name][key] for row in scored]
    found = []
    for other in others:
        theirs = [row["replies"][other][key] for row in scored]
        won = statistics.compare(name, other, by, statistics.outcomes(own, theirs))
        found.append((statistics.difference(own, theirs), won))
    adjusted = statistics.holm_adjusted([p for score, won in found for p in (score.p_value, won.p_value)])
    against = [
        {
            "name": other,
            "difference": dataclasses.asdict(score) | {"adjusted_p": adjusted[2 * place]},
            "wins": {"rate": won.win_rate, "low": won.low, "high": won.high, "adjusted_p": adjusted[2 * place + 1]},
            "kl": policies[other].get("kl"),
        }
        for place, (other, (score, won)) in enumerate(zip(others, found, strict=True))
    ]
    kl = policies[name].get("kl")
    made = {"name": name, "by": by, "prompts": len(scored), "baseline": baseline, "kl": kl, "against": against}
    return made | {"sentences": [_whole(made), *(_sentence(made, each) for each in against)]}


def at_equal_kl(made: Any, along: Mapping[str, Any]) -> Any:
    """A verdict that says in its last sentence too how the policies compare at the same KL, by an evaluation's curves;
    as it was where nothing can be said, or there is no verdict."""
    told = equal_kl_sentence(made["name"], along["against"], along["baseline"]) if made else ""
    return made | {"at_equal_kl": told, "sentences": [*made["sentences"], told]} if told else made


_OUTCOMES = {
    (1, 0): ("better", "better than"),
    (1, 1): ("better", "better than"),
    (-1, 0): ("worse", "worse than"),
    (-1, -1): ("worse", "worse than"),
    (1, -1): ("higher score, fewer wins", "of higher score but fewer wins than"),
    (-1, 1): ("lower score, more wins", "of lower score but more wins than"),
    (0, 1): ("no difference of score, more wins", "without a shown difference of score but with more wins than"),
    (0, -1): ("no difference of score, fewer wins", "without a shown difference of score but with fewer wins than"),
    (0, 0): ("no difference found", "not shown to differ from"),
}
"""(what was found of the score, of the wins; 0: no difference) -> what a table calls it, and what a sentence says."""
_WORDS = dict(_OUTCOMES.values())


def outcome(each: Mapping[str, Any]) -> str:
    """What one comparison of a verdict found: "better", "worse", "no difference found", or that its score and its wins
    say different things, as they may where a few prompts' scores differ by much."""
    score, wins = each["difference"], each.get("wins")
    by_wins = _sign(wins["rate"] - 0.5, wins["adjusted_p"]) if wins is not None else 0
    return _OUTCOMES[_sign(score["mean"], score["adjusted_p"]), by_wins][0]


def _sign(difference: float, adjusted_p: float) -> int:
    """1 or -1 for a difference that was found, else 0."""
    return 0 if adjusted_p >= LEVEL else 1 if difference > 0 else -1


def _whole(made: Mapping[str, Any]) -> str:
    found = summary((each["name"], outcome(each)) for each in made["against"])
    text = f"{made['name']} is {found}, by {made['by']}, on {made['prompts']:,} held-out prompts"
    others = [each["kl"] for each in made["against"] if each["kl"] is not None]
    if made["kl"] is not None and others:
        text += f", at {made['kl']:.1f} nats of KL to {made['baseline']} (the others: {_range(others)})"
    return f"{text}."


def summary(outcomes: Iterable[tuple[str, str]]) -> str:
    """What was found of whom, in words. outcomes: (name, see `outcome`)."""
    names: dict[str, list[str]] = {}
    for name, found in outcomes:
        names.setdefault(_WORDS[found], []).append(name)
    told = [f"{words} {listed(names[words])}" for words in sorted(names, key=list(_WORDS.values()).index)]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])}, and {told[-1]}"


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.1f}", f"{max(values):.1f}"
    return least if least == most else f"{least} to {most}"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(made: Mapping[str, Any], each: Mapping[str, Any]) -> str:
    score, wins = each["difference"], each["wins"]
    digits = decimals((score["high"] - score["low"]) / 4)
    text = f"{made['name']} − {each['name']}: {score['mean']:+.{digits}f} [{score['low']:.{digits}f}, "
    text += f"{score['high']:.{digits}f}] of score ({told_p(score['adjusted_p'])}); {made['name']} wins "
    text += f"{100 * wins['rate']:.0f} % [{100 * wins['low']:.0f}, {100 * wins['high']:.0f}] of the prompts"
    text += f" ({told_p(wins['adjusted_p'])})"
    if made["kl"] is not None and each["kl"] is not None:
        text += f", at {made['kl']:.1f} against {each['kl']:.1f} nats of KL to {made['baseline']}"
    return f"{text}: {outcome(each)}."


def equal_kl_sentence(name: str, against: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Comparisons at equal KL, see `curves.section`, in words; "" where there are no other policies."""
    if not against:
        return ""
    compared = [row for row in against if row["difference"] is not None]
    missing = [row["name"] for row in against if row["difference"] is None and not row["begins"]]
    begins = [row["name"] for row in against if row["begins"]]
    parts = [f"{_WORDS[outcome(row)]} {row['name']} ({_told_at(row)})" for row in compared]
    text = f"At equal KL to {baseline}, {name} is {listed(parts)}." if parts else ""
    text = text or f"At equal KL to {baseline}, {name} can't be compared with the others."
    if begins:
        text += f" Its training begins with {listed(begins)}, so that they are one policy at that KL."
    if missing:
        text += f" No curve of the two surely reaches the other's KL for {listed(missing)}."
    return text


def _told_at(row: Mapping[str, Any]) -> str:
    score = row["difference"]
    return f"{with_interval(score, '+')} at {row['kl']:.1f} nats, {told_p(score['adjusted_p'])}"


def told_p(value: float) -> str:
    """A p-value as text."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def decimals(error: float) -> int:
    """Places behind the point that a number with this standard error deserves: those of the error's two leading
    digits, from 0 to 4; 3 where no error is known."""
    return 3 if not math.isfinite(error) or error <= 0 else min(4, max(0, 1 - math.floor(math.log10(error))))


def with_error(value: float, error: float) -> str:
    """A mean and its standard error, with the digits that the error allows."""
    digits = decimals(error)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def with_interval(cell: Mapping[str, float] | None, sign: str = "") -> str:
    """A mean and its 95 % interval, with the digits that its width allows; "" where there is none. sign: "+" for a
    difference."""
    if cell is None:
        return ""
    digits = decimals((cell["high"] - cell["low"]) / 4)
    return f"{cell['mean']:{sign}.{digits}f} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"


def _scored(rows: Sequence[Row], key: str, policies: Iterable[str]) -> list[Row]:
    return [row for row in rows if all(row["replies"][name].get(key) is not None for name in policies)]
