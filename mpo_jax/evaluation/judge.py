"""Replies and a judge's verdicts on them, in both orders, enter; the table of who wins leaves, with the judge's habits.

A prompt counts as won where both orders name the same policy, as a tie where they disagree or both say so, and not at
all where either order has no readable verdict: those are counted and shown, never guessed.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge_prompts, statistics
from mpo_jax.evaluation.judge_prompts import FIRST, SECOND, TIE, Question

Row = Mapping[str, Any]
"""A line of replies.jsonl."""
AT = "@"
"""Stands between a policy and the decoding of its replies, where an evaluation has several: "mpo@greedy"."""


def read_replies(path: epath.Path) -> list[Row]:
    """The lines of a replies.jsonl. InputError for one that is missing or not JSON."""
    if not path.exists():
        raise InputError(f"{path}: no such file; run an evaluation first")
    rows = artifacts.read_lines(path)
    if not rows:
        raise InputError(f"{path}: holds no replies")
    return rows


def pairs_of(rows: Sequence[Row], policies: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Which policies to compare: each with the baseline, or every two. policies: some of those in rows; empty: all.
    Replies of several decodings are compared within each: "mpo@greedy" with "sft@greedy".

    The later policy stands left, so that a win rate above one half says that it is the better.
    """
    known = list(rows[0]["replies"])
    for name in [*policies, *([baseline] if baseline else [])]:
        if name not in known:
            raise InputError(f"policies: no replies of {name!r}; expected some of {', '.join(known)}")
    chosen = [name for name in known if not policies or name in policies or name == baseline]
    if len(chosen) < 2:
        raise InputError(f"policies: {', '.join(chosen)}; a comparison needs two")
    if baseline:
        beside = {name: f"{baseline}{AT}{decoding}" for name in chosen if (decoding := _decoding(name, known))}
        paired = [(name, beside.get(name, baseline)) for name in chosen]
        return [(name, other) for name, other in paired if name != other and other in known]
    return [
        (right, left)
        for left, right in itertools.combinations(chosen, 2)
        if _decoding(left, known) == _decoding(right, known)
    ]


def _decoding(name: str, known: Sequence[str]) -> str:
    """By which replies were drawn, "" for the evaluation's own."""
    policy, _, decoding = name.rpartition(AT)
    return decoding if policy in known else ""


def by_answers(
    rows: Sequence[Row],
    pairs: Sequence[tuple[str, str]],
    by: str,
    questions: Sequence[Question],
    answers: Sequence[str | None],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The table of a judge that was asked. answers: to each question, None where it could not be put."""
    verdicts = {
        (q.left, q.right, q.prompt_id, q.first == q.left): judge_prompts.verdict(answer)
        for q, answer in zip(questions, answers, strict=True)
    }
    tables = []
    for left, right in pairs:
        both = [
            (verdicts[left, right, row["prompt_id"], True], verdicts[left, right, row["prompt_id"], False])
            if (left, right, row["prompt_id"], True) in verdicts
            else (TIE, TIE)  # the same text twice, never asked
            for row in rows
        ]
        asked = [(left, right, row["prompt_id"], True) in verdicts for row in rows]
        tables.append(_pair_table(rows, left, right, by, both, asked, resamples, seed))
    return _whole(by, tables, asked=True)


def by_scores(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], by: str, key: str, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The same table from scores in the replies ("reward", "gold"): the order in which they stand plays no part."""
    tables = []
    for left, right in pairs:
        both = _by_score(rows, left, right, key)
        valid = [None not in pair for pair in both]
        if not any(valid):
            raise InputError(f"judge {key!r}: the replies of {left} and {right} hold no {key} scores")
        tables.append(_pair_table(rows, left, right, by, both, valid, resamples, seed))
    return _whole(by, tables, asked=False)


def _by_score(rows: Sequence[Row], left: str, right: str, key: str) -> list[tuple[str | None, str | None]]:
    """What scores say of each prompt, as of a judge that was asked in both orders; None where one has no score."""
    scores = [[row["replies"][name].get(key) for name in (left, right)] for row in rows]
    return [
        (None, None) if None in (a, b) else (FIRST, SECOND) if a > b else (SECOND, FIRST) if a < b else (TIE, TIE)
        for a, b in scores
    ]


def _pair_table(
    rows: Sequence[Row],
    left: str,
    right: str,
    by: str,
    both: Sequence[tuple[str | None, str | None]],
    asked: Sequence[bool],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """One pair of policies. both: the verdicts with left shown first, and with right shown first."""
    valid = [None not in pair for pair in both]
    if not any(valid):
        raise InputError(
            f"judge {by}: not one readable verdict on {left} and {right}; see verdicts.jsonl for what it answered"
        )
    outcome = np.array([_outcome(*pair) for pair, good in zip(both, valid, strict=True) if good])
    lengths = np.array(
        [row["replies"][left]["tokens"] - row["replies"][right]["tokens"] for row, good in zip(rows, valid, strict=True)
         if good]
    )  # fmt: skip
    single = [verdict for pair, here in zip(both, asked, strict=True) if here for verdict in pair]
    twice = [pair for pair, good, here in zip(both, valid, asked, strict=True) if good and here]
    decided = [verdict for verdict in single if verdict in (FIRST, SECOND)]
    counts = [_counts(pair) if here else np.zeros(len(_COUNTED)) for pair, here in zip(both, asked, strict=True)]
    return {
        "counts": np.array(counts),
        "comparison": statistics.compare(left, right, by, outcome, lengths, resamples, seed),
        "identical": len(rows) - sum(asked),
        "answers": len(single),
        "invalid_answers": single.count(None),
        "invalid_prompts": len(rows) - sum(valid),
        "ties": int(np.sum(outcome == 0.5)),
        "decided": len(decided),
        "first": decided.count(FIRST),
        "twice": len(twice),
        "agreed": sum(_same(*pair) for pair in twice),
        "first_twice": twice.count((FIRST, FIRST)),
        "second_twice": twice.count((SECOND, SECOND)),
        "longer": float(np.mean(lengths > 0)),
        "length_preference": _length_preference(outcome, lengths),
    }


def _whole(by: str, tables: Sequence[dict[str, Any]], asked: bool) -> dict[str, Any]:
    """Plain data: the pairs with Holm's correction, and the judge's own habits over all of them. asked: whether it
    answered questions, in which a reply stands first."""
    comparisons = statistics.holm([table.pop("comparison") for table in tables])
    by_prompt = dict(zip(_COUNTED, sum(table.pop("counts") for table in tables).T, strict=True))
    total = {key: sum(table[key] for table in tables)
             for key in ("answers", "invalid_answers", "decided", "first", "twice", "agreed")}  # fmt: skip
    return {
        "by": by,
        "pairs": [
            table | dataclasses.asdict(comparison) | {"sentence": statistics.sentence(comparison)}
            for table, comparison in zip(tables, comparisons, strict=True)
        ],
        "habits": total
        | {
            "asked": asked,
            "ties": int(by_prompt["ties"].sum()),
            "position_bias": _share(total["first"], total["decided"]),
            "position_bias_interval": statistics.ratio_interval(by_prompt["first"], by_prompt["decided"]),
            "agreement": _share(total["agreed"], total["twice"]),
            "flipped": _share(total["twice"] - total["agreed"], total["twice"]),
            "flipped_interval": statistics.ratio_interval(by_prompt["flipped"], by_prompt["twice"]),
        },
    }


_COUNTED = ("first", "decided", "ties", "flipped", "twice")
"""What is counted of each prompt, over all pairs of policies: verdicts for the reply shown first, for either, for none;
whether the verdict turned with the order, of prompts whose both orders could be read."""


def _counts(pair: tuple[str | None, str | None]) -> np.ndarray:
    """f64 [_COUNTED] of one prompt and pair of policies."""
    twice = None not in pair
    decided = sum(verdict in (FIRST, SECOND) for verdict in pair)
    flipped = twice and not _same(*pair)
    return np.array([pair.count(FIRST), decided, pair.count(TIE), flipped, twice], np.float64)


def _outcome(left_first: str | None, right_first: str | None) -> float:
    """1 where both orders name left, 0 where both name right, else a tie."""
    return {(FIRST, SECOND): 1.0, (SECOND, FIRST): 0.0}.get((str(left_first), str(right_first)), 0.5)


def _same(left_first: str | None, right_first: str | None) -> bool:
    return (left_first, right_first) in ((FIRST, SECOND), (SECOND, FIRST), (TIE, TIE))


def _length_preference(outcome: np.ndarray, lengths: np.ndarray) -> float | None:
    """Share of won prompts that the longer reply won; None where lengths never differ."""
    here = (outcome != 0.5) & (lengths != 0)
    return float(np.mean((outcome[here] == 1) == (lengths[here] > 0))) if here.any() else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def score_lines(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], key: str) -> list[dict[str, Any]]:
    """The lines of `verdict_lines` for scores, which nobody was asked for: both orders of what they say."""
    return [
        {"prompt_id": row["prompt_id"], "left": left, "right": right, "first": first, "verdict": verdict,
         "answer": None}
        for left, right in pairs
        for row, both in zip(rows, _by_score(rows, left, right, key), strict=True)
        for first, verdict in zip((left, right), both, strict=True)
    ]  # fmt: skip


def verdict_lines(questions: Sequence[Question], answers: Sequence[str | None]) -> list[dict[str, Any]]:
    """A line for each question, with what was answered and how it was read."""
    return [
        {"prompt_id": q.prompt_id, "left": q.left, "right": q.right, "first": q.first,
         "verdict": judge_prompts.verdict(answer), "answer": answer}
        for q, answer in zip(questions, answers, strict=True)
    ]  # fmt: skip
