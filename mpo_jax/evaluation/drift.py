"""A preference training's evaluations on easy and on hard held-out pairs enter; how the two drift apart leaves, drawn
and in numbers.

Easy pairs are what DPO learns from in MPO, hard ones what PPO's prompts come from: a policy that gains on the first and
loses on the second has learned the easy pairs by heart, and begins PPO worse than it might.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mpo_jax import metrics
from mpo_jax.evaluation import figures
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation.sections import Finished
from mpo_jax.types import BUCKETS

Rows = Sequence[Mapping[str, float]]


def points(rows: Rows, bucket: str, of: str = "accuracy") -> list[tuple[int, float]]:
    """(step, value) of a bucket's held-out pairs at each evaluation. rows: of a stage's metrics."""
    return metrics.points(rows, f"eval/{bucket}_{of}")


def pictures(stage: Finished) -> Iterable[figures.Drawn]:
    """Accuracy, and margin, of easy, hard and flipped held-out pairs along training; none of a stage whose pairs nobody
    has divided."""
    rows = metrics.read(stage.folder)
    for of, label, levels in (
        ("accuracy", "accuracy on held-out pairs", {"chance": 0.5}),
        ("reward_margin", "reward margin on held-out pairs", {}),
    ):
        curves = {bucket: found for bucket in BUCKETS if (found := points(rows, bucket, of))}
        if curves:
            yield figures.lines(curves, "step", label, levels=levels)


def apart(rows: Rows, pairs: int) -> dict[str, Any] | None:
    """How far hard held-out accuracy has fallen from its best while easy accuracy has not; None where it has not fallen
    by over two standard errors. pairs: of each evaluation.

    The standard error takes both evaluations for independent, though they are of the same pairs: a bound from above.
    """
    hard, easy = points(rows, "hard"), dict(points(rows, "easy"))
    shares = dict(points(rows, "hard", "share"))
    if len(hard) < 2 or not easy:
        return None
    (step, best), (last, end) = max(hard, key=lambda each: each[1]), hard[-1]
    count = round(shares[last] * pairs)
    error = math.hypot(pair_tables.standard_error(best, count), pair_tables.standard_error(end, count))
    if step not in easy or last not in easy or best - end <= 2 * error or easy[last] < easy[step]:
        return None
    return {"step": step, "best": best, "last": last, "end": end, "easy": (easy[step], easy[last]), "pairs": count}
