"""Pairs enter; how much better the chosen reply of each is than the rejected one leaves, by the measures a split names.

A measure gives two scores to every pair, and the gap is their difference. The paper's is the reward model's score; the
others are those of the literature around it. Several measures are joined by rank, as their units differ.
"""

from typing import Any

import numpy as np

from mpo_jax.artifacts import POLICY
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.models.config import ModelConfig
from mpo_jax.settings import OneOrMany, Positive, Section, role, setting, wrong
from mpo_jax.stages import job as jobs
from mpo_jax.stages import reference, rows
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs
from mpo_jax.types import Batch, PyTree

MEASURES: dict[str, tuple[str, ...]] = {
    "reward": ("reward",), "given": (), "implicit": ("implicit", "reference"), "reference_loss": ("reference",),
}  # fmt: skip
"""What a gap may be measured by -> the roles that it reads."""

UNITS = {"reward": "reward units", "given": "the data's units", "implicit": "nats", "reference_loss": "nats per token"}


class Measures(Section):
    """How a split measures gaps."""

    gap: OneOrMany = setting(
        "reward",
        "what gaps are differences of: the scorer's scores (reward), the data's own margins (given), implicit rewards "
        "beta log policy/reference (implicit), or log-probs per token under the reference (reference_loss); with "
        "several, a gap is the mean of its signed ranks",
    )
    implicit: str = role(POLICY, "", "the policy of the implicit rewards, for gap=implicit")
    reference: str = role(
        POLICY, "", "the frozen policy that implicit rewards are relative to, or whose log-probs are compared"
    )
    beta: Positive = setting(0.1, "beta of the implicit reward; Rafailov et al. 2023, eq. 5")

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(self.gap.split(",")) if isinstance(self.gap, str) else self.gap

    @property
    def gap_unit(self) -> str:
        return UNITS[self.measures[0]] if len(self.measures) == 1 else "mean signed rank"

    def check_measures(self, given: dict[str, Any], samples: bool) -> None:
        """Raises `wrong` for measures that can't be meant. given: role -> what is named there. samples: whether pairs
        are sampled, which need scores and whose margins nobody gave."""
        for name in self.measures:
            if name not in MEASURES:
                raise wrong("gap", f"{name!r}; expected one of {', '.join(MEASURES)}, or several of them")
        if len(set(self.measures)) < len(self.measures):
            raise wrong("gap", f"{','.join(self.measures)}; expected each once")
        if samples and "given" in self.measures:
            raise wrong("gap", "given, but nobody gave sampled pairs a margin; expected pair_source=dataset")
        read = {role for name in self.measures for role in MEASURES[name]} | ({"reward"} if samples else set())
        for name, value in given.items():
            if name in read and not value:
                need = "sampled pairs need" if name == "reward" and samples else f"gap={','.join(self.measures)} needs"
                raise wrong(name, f"empty, but {need} it")
            if value and name not in read:
                raise wrong(
                    name, f"{value!r}, but gap={','.join(self.measures)} does not read it; expected an empty text"
                )


def margins(margin: np.ndarray) -> np.ndarray:
    """f32 [pairs,2]: the data's margin as chosen's score, 0 as rejected's."""
    return np.stack([margin, np.zeros_like(margin)], axis=1).astype(np.float32)


def implicit_rewards(policy: np.ndarray, frozen: np.ndarray, beta: float) -> np.ndarray:
    """f32 [pairs,2]: beta log policy/reference of both replies, from summed log-probs f32 [pairs,2]. Rafailov et al.
    2023 (arXiv 2305.18290), eq. 5, up to a term of the prompt's own, which the gap doesn't see."""
    return np.float32(beta) * (policy - frozen)


def mean_logps(logps: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """f32 [pairs,2]: log-probs per token, the losses' negatives. logps f32 [pairs,2]: sums. lens int [pairs,2]."""
    return (logps / np.maximum(lens, 1)).astype(np.float32)


def signed_ranks(gap: np.ndarray) -> np.ndarray:
    """f64 [pairs], from -1 to 1: the rank of the gap's size among all, over their number, with the gap's sign, as in
    Wilcoxon's test. Gaps of equal size share the mean of their ranks."""
    _, place, counts = np.unique(np.abs(gap), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return np.sign(gap) * ranks[place] / len(gap)


def joined(scores: list[np.ndarray]) -> np.ndarray:
    """f32 [pairs,2]: the measure's own scores, or the mean signed rank of several measures' gaps and 0."""
    if len(scores) == 1:
        return scores[0]
    return margins(np.mean([signed_ranks(each[:, 0] - each[:, 1]) for each in scores], axis=0))


def programs(job: Job[Any], model: ModelConfig, weights: PyTree, pairs: Batch) -> Programs:
    """The log-probs that the measures read. weights: shapes of a frozen policy. pairs: of two replies."""
    if not {"implicit", "reference_loss"} & set(job.settings.measures):
        return {}
    return {"logps": rows.logps_program(job, model, weights, pairs, 2)}


def scores(job: Job[Any], compiled: Programs, base: PyTree, encoded: Encoded, rewards: np.ndarray) -> np.ndarray:
    """f32 [pairs,2]: what the split's measures say of its pairs. rewards: f32 [pairs,2], the reward model's scores."""
    settings, found = job.settings, []
    frozen = np.zeros(0)
    if "logps" in compiled:
        (frozen,) = reference.logps(job, compiled["logps"], base, [encoded])
    for name in settings.measures:
        if name == "reward":
            found.append(rewards)
        elif name == "given":
            encode.check_margins(encoded, f"stages.{job.name}.gap")
            found.append(margins(encoded.margin))
        elif name == "implicit":
            model = jobs.model(job)
            implicit = job.inputs["implicit"]
            weights = base | jobs.load_weights(job, implicit, model, jobs.frozen_dtype(job))
            of = jobs.making(implicit)
            policy = rows.compute(job, compiled["logps"], weights, encoded, settings.batch_size, of)
            found.append(implicit_rewards(policy, frozen, settings.beta))
        else:
            found.append(mean_logps(frozen, encoded.piece_lens[:, 1:]))
    return joined(found)
