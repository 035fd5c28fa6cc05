"""What a PPO stage has logged enters; the known failures of reinforcement learning on a reward model leave, in words,
with what to try. `signatures` tells them beside those of the other kinds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_jax.evaluation import ppo_curves, validation
from mpo_jax.evaluation.sections import Finished

EPOCHS, LEARNED = 3.0, 0.1
"""Times that PPO may see a prompt, and the share of the returns' variance that a value should explain at the end."""
LONGER, REPEATED = 1.4, 0.1
"""Growth of replies in length, as a factor, and in the share of repeated 4-grams, that is taken for hacking."""
LOST = 0.25
"""The share of its gain that gold may lose again while the reward model's score still rises."""
COLLAPSED, CUT = 0.2, 0.5
"""Entropy at the end over that of the first step, and the share of finished replies, below which a policy is unwell."""
MOVED, STEPS = 0.02, 10
"""Nats of KL at the end below which a policy has not moved, after so many steps."""
FAR, BEYOND = 1.0, 3.0
"""Nats of KL a token that no useful policy needs, and KL over its target, above which a policy has run away."""
EMPTY, UNSCORED = 1.5, 0.5
"""Mean tokens of replies that are empty but for their end, and the share of prompts that may have no score."""

Rows = Sequence[Mapping[str, float]]
Summary = Mapping[str, Any]
Found = tuple[str, str] | None


def few_prompts(summary: Summary, rows: Rows) -> Found:
    """PPO that goes over few prompts again and again while its value learns nothing."""
    if not {"epochs", "prompts"} <= set(summary) or summary["epochs"] <= EPOCHS:
        return None
    told = f"PPO went {summary['epochs']:.1f} times over its {summary['prompts']:,} prompts, and "
    attempt = (
        "Hard prompts may be too few: raise the split's threshold, which makes more pairs hard, or take fewer steps."
    )
    explained = _values(rows, "explained_variance")
    if explained:
        if _end(explained) >= LEARNED:
            return None
        return f"{told}the critic explains {_end(explained):.2f} of the returns' variance at the end.", attempt
    trained, held = _values(rows, "score"), _values(rows, "eval/score")
    if len(trained) < 2 or len(held) < 2 or trained[-1] <= trained[0] or held[-1] > held[0]:
        return None
    told += (
        f"the score on them rose from {trained[0]:.2f} to {trained[-1]:.2f}, while on held-out prompts it went from "
    )
    return f"{told}{held[0]:.2f} to {held[-1]:.2f}: the policy learns its prompts by heart.", attempt


def unlearned_value(summary: Summary, rows: Rows) -> Found:
    """A value that is worse than the mean of the returns, over the last third of a training."""
    explained = _values(rows, "explained_variance")
    if len(explained) < 6 or _end(explained) >= 0:
        return None
    told = (
        f"The critic explains {_end(explained):.2f} of the returns' variance at the end: it is worse than their mean."
    )
    return (
        told,
        "Begin the critic from the reward model, raise value_learning_rate, or use algorithm=rloo, which has no "
        "critic.",
    )


def hacked(summary: Summary, rows: Rows) -> Found:
    """A score that rises while gold, length or repetition say otherwise (Gao et al. 2023, arXiv 2210.10760)."""
    attempt = "Try a larger kl_coefficient, fewer steps, select=best, or a reward model trained on such replies."
    curve = validation.over_optimisation(rows)
    if curve is not None:
        gain = curve["best"]["gold"] - curve["points"][0]["gold"]
        if curve["gained"] > 0 and curve["lost"] > LOST * max(gain, 0) and curve["lost"] > 0:
            told = f"The gold score fell by {curve['lost']:.3f} from step {curve['best']['step']} to the end, while "
            return f"{told}the reward model's score rose by {curve['gained']:.3f}.", attempt
    held = [row for row in rows if "eval/score" in row and "eval/response_len" in row]
    if len(held) < 2 or held[-1]["eval/score"] <= held[0]["eval/score"]:
        return None
    before, after = held[0], held[-1]
    growth = after["eval/response_len"] / max(before["eval/response_len"], 1e-6)
    repeated = after.get("eval/repetition", 0.0) - before.get("eval/repetition", 0.0)
    if growth >= LONGER:
        lengths = f"{before['eval/response_len']:.0f} to {after['eval/response_len']:.0f} tokens"
        return f"The score rose, and replies grew from {lengths}: the reward model may reward length.", attempt
    if repeated >= REPEATED:
        told = f"The score rose, and repeated 4-grams grew from {before['eval/repetition']:.2f} to "
        return f"{told}{after['eval/repetition']:.2f} of the replies.", attempt
    return None


def unwell(summary: Summary, rows: Rows) -> Found:
    """A policy whose entropy has collapsed, or that hardly ends its replies."""
    trained = [row for row in rows if "entropy" in row and "finished" in row]
    if len(trained) < 2:
        return None
    first, last = trained[0], trained[-1]
    if first["entropy"] > 0 and last["entropy"] < COLLAPSED * first["entropy"]:
        told = (
            f"Entropy fell from {first['entropy']:.2f} to {last['entropy']:.2f} nats per token: all replies are alike."
        )
        return told, "Raise kl_coefficient or entropy, or take fewer steps."
    if last["finished"] < CUT:
        told = f"Only {last['finished']:.2f} of the replies end before max_new_tokens."
        return told, "Allow longer replies, or raise missing_eos_penalty."
    return None


def kl_collapsed(summary: Summary, rows: Rows) -> Found:
    """A policy that stays where it began, or that has left its reference altogether."""
    trained = [row for row in rows if "kl" in row and "response_len" in row]
    if len(trained) < STEPS:
        return None
    kl = _end([row["kl"] for row in trained])
    each = kl / max(_end([row["response_len"] for row in trained]), 1e-6)
    if abs(kl) < MOVED:
        steps = int(trained[-1]["step"])
        told = f"After {steps} steps the KL to the reference is {kl:.3f} nats: the policy has hardly moved."
        return told, "Raise learning_rate, or lower kl_coefficient; look at grad_norm and at critic_warmup."
    if each > FAR:
        told = f"The KL to the reference is {kl:.1f} nats, {each:.2f} per token: the policy is too far from it."
        return told, "Raise kl_coefficient, set kl_target, or lower learning_rate."
    return None


def beyond_target(stage: Finished, rows: Rows) -> Found:
    """An adaptive penalty that does not hold its target."""
    kl = _values(rows, "kl")
    target = stage.settings.get("kl_target", 0) if len(kl) >= STEPS else 0
    if not target or _end(kl) < BEYOND * target:
        return None
    told = f"The KL to the reference is {_end(kl):.1f} nats at the end, but kl_target is {target:g}."
    return told, "Raise kl_coefficient (the adaptive coefficient begins there) or kl_gain, or lower learning_rate."


def empty_batches(summary: Summary, rows: Rows) -> Found:
    """Steps that had nothing to learn from: no scores, or no replies."""
    unscored, lens = _values(rows, "unscored"), _values(rows, "response_len")
    without = [row for row in rows if row.get("updates", 1) == 0]
    if without:
        steps, first = sum("updates" in row for row in rows), int(without[0]["step"])
        told = f"{len(without)} of {steps} logged steps made no update, the first of them step {first}: none of their "
        return f"{told}replies had a score.", "Look at what the scorer answers."
    if unscored and _end(unscored) > UNSCORED:
        told = f"{100 * _end(unscored):.0f} % of the prompts had no score at the end, so nothing is learned from them."
        return told, "Look at what the scorer answers, and at its time limits."
    if lens and _end(lens) < EMPTY:
        told = f"Replies are {_end(lens):.1f} tokens long at the end: they are empty."
        return (
            told,
            "Look at where prompts end, at the stop tokens, and at whether the reward model prefers empty replies.",
        )
    return None


def beyond_training(stage: Finished, rows: Rows) -> Found:
    """Scores beyond those that the reward model gave to the replies it was trained on: it has never seen such replies,
    and what it says of them is a guess."""
    score = _values(rows, "score")
    high = ppo_curves.highest(stage) if score else None
    if high is None or _end(score) <= high:
        return None
    told = (
        f"The mean score is {_end(score):.2f} at the end, beyond {high:.2f}: 99 % of the replies that the reward model "
    )
    told += "was trained on score less, so its score of such replies is only a guess."
    return (
        told,
        "Judge by gold, a judge or people; try a larger kl_coefficient, or a reward model trained on such replies.",
    )


RULES: tuple[Callable[[Summary, Rows], Found], ...] = (
    few_prompts, unlearned_value, hacked, unwell, kl_collapsed, empty_batches,
)  # fmt: skip
WHILE_TRAINING = (hacked, unwell, empty_batches)
"""Those that no early step shows without need."""


def _values(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def _end(values: Sequence[float]) -> float:
    """The mean of the last third."""
    last = values[-max(1, len(values) // 3) :]
    return sum(last) / len(last)
