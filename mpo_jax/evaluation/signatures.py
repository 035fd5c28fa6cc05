"""A finished stage enters; the known failures of the method that its figures show leave, in words, with what to try.

Each is a rule of thumb, told with the figures that set it off: a reason to look, and no proof.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mpo_jax import metrics
from mpo_jax.evaluation import validation
from mpo_jax.evaluation.sections import Finished

WEAK = 0.55
"""Accuracy on held-out pairs below which gaps are taken for noise: guessing gives 0.5."""
OVERFITTED = 1.05
"""Held-out loss at the end over its lowest, above which the training is taken to have learned its pairs by heart."""
EPOCHS, LEARNED = 3.0, 0.1
"""Times that PPO may see a prompt, and the share of the returns' variance that a value should explain at the end."""
LONGER, REPEATED = 1.4, 0.1
"""Growth of replies in length, as a factor, and in the share of repeated 4-grams, that is taken for hacking."""
LOST = 0.25
"""The share of its gain that gold may lose again while the reward model's score still rises."""
COLLAPSED, CUT = 0.2, 0.5
"""Entropy at the end over that of the first step, and the share of finished replies, below which a policy is unwell."""

Rows = Sequence[Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Sign:
    """A failure that shows. told: what was seen, in a sentence with its figures. attempt: what to try."""

    stage: str
    told: str
    attempt: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.told} {self.attempt}"


def of_stages(stages: Iterable[Finished]) -> list[Sign]:
    """Those of a run's finished stages, in their order."""
    return [sign for stage in stages for sign in of_stage(stage)]


def of_stage(stage: Finished) -> list[Sign]:
    """Those that the figures of one finished stage show."""
    summary, rows = stage.manifest["summary"] or {}, metrics.read(stage.folder)
    found = (rule(summary, rows) for rule in _RULES)
    return [Sign(stage.name, *each) for each in found if each is not None]


_Found = tuple[str, str] | None


def weak_reward(summary: Mapping[str, Any], rows: Rows) -> _Found:
    """A reward model that is hardly better than guessing, or than word counts, has gaps that mean nothing."""
    report = summary.get("report") or {}
    if not {"accuracy", "accuracy_se", "pairs", "baselines"} <= set(report):
        return None
    accuracy, error = report["accuracy"], report["accuracy_se"]
    words = report["baselines"].get("tfidf_bradley_terry")
    told = f"The reward model is right on {accuracy:.3f} ± {error:.3f} of {report['pairs']:,} held-out pairs"
    attempt = (
        "Its gaps say little about which pairs are easy: train it on more pairs or a larger model, look at the labels, "
        "or stop the run there with minimum_accuracy."
    )
    if accuracy - 2 * error <= 0.5 or accuracy < WEAK:
        return f"{told}, where guessing gives 0.5.", attempt
    if words is not None and accuracy + error < words:
        return f"{told}, fewer than a TF-IDF model of their words ({words:.3f}).", attempt
    return None


def learned_by_heart(summary: Mapping[str, Any], rows: Rows) -> _Found:
    """Held-out loss that rises again while the training's falls: for DPO, too much of the easy pairs."""
    held = [(int(row["step"]), row["eval/loss"]) for row in rows if "eval/loss" in row]
    trained = [row["loss"] for row in rows if "loss" in row]
    if len(held) < 3 or len(trained) < 2:
        return None
    (step, least), (last, loss) = min(held, key=lambda each: each[1]), held[-1]
    if least <= 0 or loss < OVERFITTED * least or trained[-1] >= trained[0]:
        return None
    told = f"Held-out loss was lowest at step {step} ({least:.3f}) and is {loss:.3f} at step {last}: overfitted."
    return (
        told,
        "Try fewer epochs, a lower rate, a larger beta (for DPO), or select=best, which takes the best checkpoint.",
    )


def few_prompts(summary: Mapping[str, Any], rows: Rows) -> _Found:
    """PPO that goes over few prompts again and again while its value learns nothing."""
    explained = [row["explained_variance"] for row in rows if "explained_variance" in row]
    if not explained or not {"epochs", "prompts"} <= set(summary) or summary["epochs"] <= EPOCHS:
        return None
    if _end(explained) >= LEARNED:
        return None
    told = f"It went {summary['epochs']:.1f} times over {summary['prompts']:,} prompts, and its value explains "
    told += f"{_end(explained):.2f} of the returns' variance at the end."
    return (
        told,
        "Hard prompts may be too few: raise the split's threshold, which makes more pairs hard, or take fewer steps.",
    )


def unlearned_value(summary: Mapping[str, Any], rows: Rows) -> _Found:
    """A value that is worse than the mean of the returns, over the last third of a training."""
    explained = [row["explained_variance"] for row in rows if "explained_variance" in row]
    if len(explained) < 6 or _end(explained) >= 0:
        return None
    told = f"The value explains {_end(explained):.2f} of the returns' variance at the end: less than their mean would."
    return told, "Begin the critic from the reward model, raise its rate, or use algorithm=rloo, which has no critic."


def hacked(summary: Mapping[str, Any], rows: Rows) -> _Found:
    """A score that rises while gold, length or repetition say otherwise (Gao et al. 2023, arXiv 2210.10760)."""
    attempt = "Try a larger kl_coefficient, fewer steps, select=best, or a reward model trained on such replies."
    curve = validation.over_optimisation(rows)
    if curve is not None:
        gain = curve["best"]["gold"] - curve["points"][0]["gold"]
        if curve["gained"] > 0 and curve["lost"] > LOST * max(gain, 0) and curve["lost"] > 0:
            told = f"Gold fell by {curve['lost']:.3f} from step {curve['best']['step']} to the end, while the reward "
            return f"{told}model's score rose by {curve['gained']:.3f}.", attempt
    held = [row for row in rows if "eval/score" in row and "eval/response_len" in row]
    if len(held) < 2 or held[-1]["eval/score"] <= held[0]["eval/score"]:
        return None
    before, after = held[0], held[-1]
    growth = after["eval/response_len"] / max(before["eval/response_len"], 1e-6)
    repeated = after.get("eval/repetition", 0.0) - before.get("eval/repetition", 0.0)
    if growth >= LONGER:
        lengths = f"{before['eval/response_len']:.0f} to {after['eval/response_len']:.0f} tokens"
        return f"With its score, replies grew from {lengths}: it may be paid for length.", attempt
    if repeated >= REPEATED:
        told = f"With its score, repeated 4-grams grew from {before['eval/repetition']:.2f} to "
        return f"{told}{after['eval/repetition']:.2f} of the replies.", attempt
    return None


def unwell(summary: Mapping[str, Any], rows: Rows) -> _Found:
    """A policy whose entropy has collapsed, or that hardly ends its replies."""
    trained = [row for row in rows if "entropy" in row and "finished" in row]
    if len(trained) < 2:
        return None
    first, last = trained[0], trained[-1]
    if first["entropy"] > 0 and last["entropy"] < COLLAPSED * first["entropy"]:
        told = f"Entropy fell from {first['entropy']:.2f} to {last['entropy']:.2f} nats a token: replies are all alike."
        return told, "Raise kl_coefficient or entropy, or take fewer steps."
    if last["finished"] < CUT:
        told = f"Only {last['finished']:.2f} of the replies end before max_new_tokens."
        return told, "Allow longer replies, or raise missing_eos_penalty."
    return None


_RULES: tuple[Callable[[Mapping[str, Any], Rows], _Found], ...] = (
    weak_reward, learned_by_heart, few_prompts, unlearned_value, hacked, unwell,
)  # fmt: skip


def _end(values: Sequence[float]) -> float:
    """The mean of the last third."""
    last = values[-max(1, len(values) // 3) :]
    return sum(last) / len(last)
