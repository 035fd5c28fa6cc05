"""Scored pairs and their buckets enter; what is told of a split leaves: a report, its plots, a few pairs as text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.data.encode import Encoded
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation import plots
from mpo_jax.types import BUCKETS, LEFT_OUT, GapTable

SIDES = ("prompt", "chosen", "rejected")


def build(
    table: GapTable,
    encoded: Encoded,
    threshold: float,
    measures: Sequence[str] = ("reward",),
    unit: str = "reward units",
    scored_by: str = "the reward model",
) -> dict[str, Any]:
    """Counts, agreement with the labels (whole, by decile of the gap's size, by the annotator's confidence where it is
    known), lengths of each bucket in tokens, and `pairs.pair_report` of the scores. measures, unit: of the gap.
    scored_by: who agrees with a label, or does not."""
    gap, lens, bucket = np.asarray(table.gap), encoded.piece_lens, np.asarray(table.bucket)
    order = np.argsort(np.abs(gap), kind="stable")
    scores = np.stack([table.score_chosen, table.score_rejected], axis=1)
    left_out = int((bucket == LEFT_OUT).sum())
    whole = pair_tables.pair_report(scores, lens[:, 1:], np.asarray(encoded.confidence))
    return {
        "measures": list(measures),
        "scored_by": scored_by,
        "unit": unit,
        "threshold": threshold,
        "pairs": len(gap),
        "counts": {name: int((bucket == index).sum()) for index, name in enumerate(BUCKETS)}
        | ({"left out": left_out} if left_out else {}),
        "agreement": whole["accuracy"],
        "agreement_by_gap_decile": [
            {
                "from": float(np.abs(gap[part]).min()),
                "to": float(np.abs(gap[part]).max()),
                "pairs": len(part),
                "agreement": pair_tables.accuracy(gap[part]),
            }
            for part in np.array_split(order, 10)
            if len(part)
        ],
        "lengths": {
            name: lengths(lens[bucket == index]) for index, name in enumerate(BUCKETS) if (bucket == index).any()
        },
        "scores": whole,
    }


def lengths(lens: np.ndarray) -> dict[str, Any]:
    """Mean, median and 95th percentile of tokens on each side, and the share of pairs whose chosen reply is the longer
    one (equal lengths count half). lens: int [pairs,3]."""
    found: dict[str, Any] = {
        side: {
            "mean": float(column.mean()),
            "median": float(np.median(column)),
            "p95": float(np.percentile(column, 95)),
        }
        for side, column in zip(SIDES, lens.T, strict=True)
    }
    return found | {"chosen_longer": 1 - pair_tables.shorter_wins(lens[:, 1:])}


def draw(folder: epath.Path, gap: np.ndarray, report: dict[str, Any]) -> None:
    """gaps.png, easy_share.png, agreement.png and, where confidences are known, confidence.png."""
    plots.gap_histogram(folder / artifacts.GAPS_PLOT, gap, report["threshold"], report["unit"])
    plots.easy_share(folder / artifacts.EASY_PLOT, gap, report["threshold"], report["unit"])
    deciles = report["agreement_by_gap_decile"]
    plots.bars(
        folder / artifacts.AGREEMENT_PLOT,
        [f"{row['from']:.2f}–{row['to']:.2f}" for row in deciles],
        [row["agreement"] for row in deciles],
        [row["pairs"] for row in deciles],
        f"size of the gap, by decile, {report['unit']}",
        "agreement with the label",
    )
    if "by_confidence" in report["scores"]:
        rows = report["scores"]["by_confidence"]
        plots.bars(
            folder / artifacts.CONFIDENCE_PLOT,
            [f"{row['confidence']:g}" for row in rows],
            [row["accuracy"] for row in rows],
            [row["pairs"] for row in rows],
            "annotator's confidence",
            "agreement with the label",
        )


def samples(encoded: Encoded, table: GapTable, tokenizer, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The first few pairs of each bucket, as text."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, name in enumerate(BUCKETS):
        found[name] = []
        for row in np.flatnonzero(np.asarray(table.bucket) == index)[:count]:
            texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in encoded.row(int(row))]
            kept = dict(zip(SIDES, texts, strict=True))
            found[name].append({"id": int(table.id[row]), "gap": float(table.gap[row])} | kept)
    return found
