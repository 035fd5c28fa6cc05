"""A finished stage enters; the known failures of the method that its figures show leave, in words, with what to try.

Each is a rule of thumb, told with the figures that set it off: a reason to look, and no proof.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mpo_jax import metrics
from mpo_jax.evaluation import contradicted, drift, ppo_signatures, reward_model
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.evaluation.sections import Finished

WEAK = 0.55
"""Accuracy on held-out pairs below which gaps are taken for noise: guessing gives 0.5."""
_SURE = "predicted", "observed"
OVERFITTED = 1.05
"""Held-out loss at the end over its lowest, above which the training is taken to have learned its pairs by heart."""

Rows = Sequence[Mapping[str, float]]
Summary = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sign:
    """A failure that shows. told: what was seen, in a sentence with its figures. attempt: what to try. figure: where in
    the page it is drawn, the id of an element."""

    stage: str
    told: str
    attempt: str
    figure: str = ""

    def __str__(self) -> str:
        return f"{self.stage}: {self.told} {self.attempt}"


def of_stages(stages: Iterable[Finished]) -> list[Sign]:
    """Those of a run's finished stages, in their order."""
    return [sign for stage in stages for sign in of_stage(stage)]


def of_stage(stage: Finished) -> list[Sign]:
    """Those that the figures of one finished stage show."""
    summary, rows = stage.manifest["summary"] or {}, metrics.read(stage.folder)
    found = [(rule(summary, rows), f"{place}-{stage.name}") for rule, place in _RULES]
    found += [(rule(stage, rows), f"{place}-{stage.name}") for rule, place in _RULES_OF_STAGES]
    return [Sign(stage.name, *each, figure=figure) for each, figure in found if each is not None]


def appeared(name: str, folder: epath.PathLike, summary: Summary, told: set[str]) -> list[Sign]:
    """Those of a training that goes on, from what it has logged so far, which were not told before. summary: what is
    known of it. told: the rules that have found something, to which the new ones are added."""
    rows = metrics.read(folder)
    found = []
    for rule in (rule for rule in _WHILE_TRAINING if rule.__name__ not in told):
        if (each := rule(summary, rows)) is not None:
            told.add(rule.__name__)
            found.append(Sign(name, *each))
    return found


Found = tuple[str, str] | None
"""What was seen, and what to try."""


def weak_reward(summary: Summary, rows: Rows) -> Found:
    """A reward model that is hardly better than guessing, or than word counts, has gaps that mean nothing."""
    report = summary.get("report") or {}
    if not {"accuracy", "accuracy_se", "pairs", "baselines"} <= set(report):
        return None
    accuracy, error = report["accuracy"], report["accuracy_se"]
    words = report["baselines"].get("tfidf_bradley_terry")
    told = f"The reward model is right on {accuracy:.3f} ± {error:.3f} of {report['pairs']:,} held-out pairs"
    attempt = (
        "Its gaps say little about which pairs are easy: train it on more pairs or a larger model, look at the labels, "
        "or let minimum_accuracy stop the run."
    )
    if accuracy - 2 * error <= 0.5 or accuracy < WEAK:
        return f"{told}; guessing gives 0.5.", attempt
    if words is not None and accuracy + error < words:
        return f"{told}; a TF-IDF model of their words is right on more ({words:.3f}).", attempt
    bins = report.get("calibration", [])
    if reward_model.miscalibrated(bins):
        claimed, right = (sum(row["pairs"] * row[key] for row in bins) / report["pairs"] for key in _SURE)
        told = f"By its gaps, the reward model should be right on {claimed:.2f} of the held-out pairs, but it is right "
        told += f"on {right:.2f} (calibration error {pair_tables.calibration_error(bins, 'observed'):.2f})."
        return (
            told,
            "A threshold in its units does not mean what it seems to: use a quantile, or train it for fewer steps.",
        )
    return None


def learned_by_heart(summary: Summary, rows: Rows) -> Found:
    """Held-out loss that rises again while the training's falls: for DPO, too much of the easy pairs."""
    held = metrics.points(rows, "eval/loss")
    trained = [row["loss"] for row in rows if "loss" in row]
    if len(held) < 3 or len(trained) < 2:
        return None
    (step, least), (last, loss) = min(held, key=lambda each: each[1]), held[-1]
    if not (math.isfinite(loss) and math.isfinite(least)):  # it was not learned by heart, it broke
        return None
    if least <= 0 or loss < OVERFITTED * least or trained[-1] >= trained[0]:
        return None
    told = f"Held-out loss was lowest at step {step} ({least:.3f}) and is {loss:.3f} at step {last}: "
    told += "the model is overfitted."
    return (
        told,
        "Try fewer epochs, a lower rate, a larger beta (for DPO), or select=best, which takes the best checkpoint.",
    )


def drifted_apart(summary: Summary, rows: Rows) -> Found:
    """DPO overfitted to the easy pairs: it loses on hard held-out ones what it had gained, while easy ones stay."""
    found = drift.apart(rows, summary.get("watched_pairs", 0))
    if found is None:
        return None
    told = f"Accuracy on hard held-out pairs fell from {found['best']:.3f} at step {found['step']} to "
    told += f"{found['end']:.3f} at step {found['last']} ({found['pairs']} pairs), while on easy ones it went from "
    told += f"{found['easy'][0]:.3f} to {found['easy'][1]:.3f}: the policy is overfitted to the easy pairs."
    return (
        told,
        "Try fewer epochs, a lower rate, a larger beta, select=best, or a lower threshold with more easy pairs.",
    )


_RULES: tuple[tuple[Callable[[Summary, Rows], Found], str], ...] = (
    (weak_reward, "reward"),
    (learned_by_heart, "training"),
    (drifted_apart, "training"),
    *((rule, "training") for rule in ppo_signatures.RULES),
)
_RULES_OF_STAGES: tuple[tuple[Callable[[Finished, Rows], Found], str], ...] = (
    (ppo_signatures.beyond_target, "training"),
    (ppo_signatures.beyond_training, "training"),
    (contradicted.by_gold, "evaluation"),
    (contradicted.by_judge, "judged"),
)
_WHILE_TRAINING = (learned_by_heart, drifted_apart, *ppo_signatures.WHILE_TRAINING)
