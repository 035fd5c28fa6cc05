"""People's judgements enter; win rates with intervals and the agreement among annotators leave, as plain data.

Prompts are the unit: several annotators' verdicts on one prompt are averaged first, then prompts are resampled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import annotation, judge, statistics
from mpo_jax.evaluation.annotation import Judgement

_LEAST = 2
"""Items that two or more annotators must share before their agreement is a number."""


def results(
    rows: Sequence[Mapping[str, Any]], judgements: Sequence[Judgement], resamples: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """The table of all judgements on these rows of replies.jsonl; None where there is none.

    pairs: a comparison for each two policies, with its sentence, ties, and how often the reward model's preference is
    the people's. alpha: Krippendorff's, over left better < tie < right better (ordinal), None where no two annotators
    share items or nobody ever differs in what they choose.
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
        "alpha": alpha(valid),
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


def section(workdir: epath.Path, stages: Mapping[str, epath.Path]) -> dict[str, Any] | None:
    """What the report shows: the results on every evaluation's replies. stages: name -> folder of every finished
    stage. None where nobody judged."""
    file = workdir / artifacts.ANNOTATIONS
    if not file.exists():
        return None
    with annotation.Store(file) as store:
        judgements = store.all()
    found = []
    for name, folder in stages.items():
        if (folder / artifacts.REPLIES_FILE).exists():
            table = results(judge.read_replies(folder / artifacts.REPLIES_FILE), judgements)
            found += [{"name": name} | table] if table is not None else []
    return {"stages": found} if found else None


def alpha(judgements: Sequence[Judgement]) -> float | None:
    """Krippendorff's alpha for ordinal data: 1 perfect agreement, 0 that of chance, below 0 worse. None also where the
    krippendorff package (extra "annotate") is not installed."""
    try:
        import krippendorff
    except ImportError:
        return None
    annotators = sorted({judgement.annotator for judgement in judgements})
    found = sorted({judgement.item for judgement in judgements})
    table = np.full((len(annotators), len(found)), np.nan)
    for judgement in judgements:
        table[annotators.index(judgement.annotator), found.index(judgement.item)] = judgement.outcome
    shared = table[:, np.isfinite(table).sum(axis=0) >= 2]
    if shared.shape[1] < _LEAST or len(np.unique(shared[np.isfinite(shared)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement="ordinal"))


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
