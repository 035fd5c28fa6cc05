"""People's judgements enter; win rates with intervals and the agreement among annotators leave, as plain data.

Prompts are the unit: several annotators' verdicts on one prompt are averaged first, then prompts are resampled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import agreement, annotation, judge, statistics
from mpo_jax.evaluation.agreement import Agreement, Key
from mpo_jax.evaluation.annotation import Judgement


def results(
    rows: Sequence[Mapping[str, Any]], judgements: Sequence[Judgement], resamples: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """The table of all judgements on these rows of replies.jsonl; None where there is none.

    pairs: a comparison for each two policies, with its sentence, ties, and how often the reward model's preference is
    the people's. agreement: see `alpha`, as plain data.
    """
    known = set(rows[0]["replies"])
    pairs = [pair for pair in sorted({(j.left, j.right) for j in judgements}) if known.issuperset(pair)]
    shown = ((annotation.item(row, left, right), row) for row in rows for left, right in pairs)
    lookup = {item.key: row for item, row in shown if item is not None}
    valid = [judgement for judgement in judgements if judgement.item in lookup]
    if not valid:
        return None
    tables = [
        _pair_table(left, right, [j for j in valid if (j.left, j.right) == (left, right)], lookup, resamples, seed)
        for left, right in pairs
        if any((j.left, j.right) == (left, right) for j in valid)
    ]
    comparisons = statistics.holm([table.pop("comparison") for table in tables])
    decided = [judgement for judgement in valid if judgement.choice != "tie"]
    names = sorted({judgement.annotator for judgement in valid})
    return {
        "pairs": [
            table | dataclasses.asdict(comparison) | {"sentence": statistics.sentence(comparison)}
            for table, comparison in zip(tables, comparisons, strict=True)
        ],
        "agreement": None if (found := alpha(valid)) is None else dataclasses.asdict(found),
        "position_bias": float(np.mean([j.choice == j.first for j in decided])) if decided else None,
        "annotators": [
            {
                "name": name,
                "judgements": len(own),
                "ties": sum(j.choice == "tie" for j in own),
                "comments": sum(bool(j.comment) for j in own),
                "median_seconds": float(np.median([j.seconds for j in own])),
            }
            for name in names
            for own in [[j for j in valid if j.annotator == name]]
        ],
        "judgements": len(valid),
        "others": len(judgements) - len(valid),
    }


def judged(workdir: epath.Path) -> list[Judgement]:
    """What people have judged of a run so far."""
    file = workdir / artifacts.ANNOTATIONS
    if not file.exists():
        return []
    with annotation.Store(file) as store:
        return store.all()


def section(judgements: Sequence[Judgement], stages: Mapping[str, epath.Path]) -> dict[str, Any] | None:
    """What the report shows: the results on every evaluation's replies. stages: name -> folder of every finished
    stage. None where nobody judged."""
    found = []
    for name, folder in stages.items():
        if judgements and (folder / artifacts.REPLIES_FILE).exists():
            table = results(judge.read_replies(folder / artifacts.REPLIES_FILE), judgements)
            found += [{"name": name} | table] if table is not None else []
    return {"stages": found} if found else None


def outcomes(rows: Sequence[Mapping[str, Any]], judgements: Sequence[Judgement]) -> dict[Key, float]:
    """What people said of these rows of replies.jsonl, several of them averaged, as `agreement.of_lines` gives it."""
    known = set(rows[0]["replies"])
    pairs = {(j.left, j.right) for j in judgements if known.issuperset((j.left, j.right))}
    shown = {item.key for row in rows for pair in pairs if (item := annotation.item(row, *pair)) is not None}
    said: dict[Key, list[float]] = {}
    for judgement in judgements:
        if judgement.item in shown:
            key = (judgement.left, judgement.right, judgement.prompt_id)
            key, outcome = agreement.turned(key, judgement.outcome)
            said.setdefault(key, []).append(outcome)
    return {key: float(np.mean(verdicts)) for key, verdicts in said.items()}


def alpha(judgements: Sequence[Judgement]) -> Agreement | None:
    """The agreement among annotators, over left better < tie < right better; None where it is not defined."""
    annotators = {name: place for place, name in enumerate(sorted({each.annotator for each in judgements}))}
    prompts = {each.item: each.prompt_id for each in judgements}
    places = {item: place for place, item in enumerate(prompts)}
    table = np.full((len(annotators), len(places)), np.nan)
    for judgement in judgements:
        table[annotators[judgement.annotator], places[judgement.item]] = judgement.outcome
    return agreement.alpha(table, list(prompts.values()))


def _pair_table(left, right, judgements, lookup, resamples, seed) -> dict[str, Any]:
    by_item: dict[str, list[float]] = {}
    for judgement in judgements:
        by_item.setdefault(judgement.item, []).append(judgement.outcome)
    outcome = np.array([np.mean(verdicts) for verdicts in by_item.values()])
    replies = [lookup[key]["replies"] for key in by_item]
    lengths = np.array([reply[left]["tokens"] - reply[right]["tokens"] for reply in replies])
    scores = [(reply[left].get("reward"), reply[right].get("reward")) for reply in replies]
    alike = [
        (a > b) == (won > 0.5)
        for (a, b), won in zip(scores, outcome, strict=True)
        if None not in (a, b) and a != b and won != 0.5
    ]
    return {
        "comparison": statistics.compare(left, right, "people", outcome, lengths, resamples, seed),
        "judgements": len(judgements),
        "ties": int(sum(verdict == 0.5 for verdicts in by_item.values() for verdict in verdicts)),
        "reward_agrees": float(np.mean(alike)) if alike else None,
        "reward_compared": len(alike),
    }
