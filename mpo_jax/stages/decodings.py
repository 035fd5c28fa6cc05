"""An evaluation's settings enter; the rows of its table leave: every policy by every decoding, and the best of n.

Best-of-n needs no training: of n replies to a prompt it keeps the one that scores highest (Stiennon et al. 2020,
arXiv 2009.01325). Its distribution is within log n - (n - 1) / n nats of the policy's (ibid., appendix G.3; Hilton,
"KL divergence of max-of-n", 2023): an upper bound, not the KL itself (Beirami et al. 2024, arXiv 2401.01879).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from mpo_jax import settings as declared
from mpo_jax.data.encode import Encoded
from mpo_jax.evaluation.judge import AT
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.settings import Amount, Names, Section, Share, Whole, changed, setting
from mpo_jax.stages import candidates, rows
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Sampling
from mpo_jax.stages.candidates import Replies
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs
from mpo_jax.types import Batch, PyTree

MOST = 4096
"""Replies to a prompt, at most."""


class Decoding(Section):
    """A way of drawing replies, beside the stage's own; how long they are is the stage's."""

    temperature: Amount = changed(Sampling, "temperature", 1.0)
    top_k: Whole = changed(Sampling, "top_k", 0)
    top_p: Share = changed(Sampling, "top_p", 0.0)
    min_new_tokens: Whole = changed(Sampling, "min_new_tokens", 0)


class Decodings(Section):
    """What stands in the table beside each policy's replies as the stage samples them."""

    decodings: dict[str, Decoding] = setting(
        {}, 'further ways of sampling replies, by name; the rows of one named "greedy" are POLICY@greedy', later=True
    )
    best_of: Whole = setting(
        0,
        "number of replies of which the best, by the reward model or otherwise by the labeller, is shown as the reply "
        "of a further policy; 0: no such policy",
        unit="replies",
        later=True,
    )
    best_of_policies: Names = setting(
        (),
        "the policies for which `best_of` is done; empty: the baseline, or the first policy if there is no baseline",
        later=True,
    )


def check_names(settings) -> None:
    """Raises, for a section's validator, what is wrong with the names of decodings and with best-of-n. settings: an
    evaluation's."""
    for name in settings.decodings:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise declared.wrong("decodings", f"{name!r}; expected a name of letters, digits, '.', '_' and '-'")
    for name in settings.policies:
        if settings.decodings and AT in name:
            raise declared.wrong(
                "decodings", f"the policy {name!r} has an {AT!r} in its name, which is kept for the names of decodings"
            )
    if settings.best_of == 1 or settings.best_of > MOST:
        raise declared.wrong("best_of", f"{settings.best_of}; expected 0, or 2 to {MOST} replies")
    if settings.best_of and not (settings.reward or settings.labeller):
        raise declared.wrong(
            "best_of", f"{settings.best_of}, but nothing scores the replies; name a reward or a labeller"
        )
    if settings.best_of_policies and not settings.best_of:
        raise declared.wrong("best_of_policies", "given, but best_of is 0")
    for name in settings.best_of_policies:
        if name not in settings.policies:
            raise declared.wrong("best_of_policies", f"{name!r} is none of {', '.join(settings.policies)}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table. policy: the stage's name. decoding: "" for the stage's own. n: replies of which the best
    counts."""

    name: str
    policy: str
    decoding: str = ""
    n: int = 1

    @property
    def suffix(self) -> str:
        """What the names of its programs end with."""
        return "_best" if self.n > 1 else f"{AT}{self.decoding}" if self.decoding else ""


def entries(settings) -> list[Entry]:
    """The rows of an evaluation's table, in their order: policies, best-of-n, and each decoding's policies."""
    best = settings.best_of_policies or (settings.baseline or settings.policies[0],)
    return [
        *(Entry(name, name) for name in settings.policies),
        *(Entry(f"{name} best of {settings.best_of}", name, n=settings.best_of) for name in best if settings.best_of),
        *(Entry(f"{name}{AT}{key}", name, key) for key in settings.decodings for name in settings.policies),
    ]


def how(job: Job, entry: Entry) -> SamplingConfig:
    """How a row's replies are drawn. InputError, by the setting, for what can't be meant."""
    if not entry.decoding:
        return candidates.of_settings(job, entry.n)
    own = job.settings.decodings[entry.decoding]
    return candidates.sampling_config(
        job, 1, max_new_tokens=job.settings.max_new_tokens, key=f"decodings.{entry.decoding}.", **dict(own)
    )


def programs(job: Job, model: ModelConfig, weights: PyTree, scorer: PyTree | None) -> Programs:
    """The sampler and the log-probs of each row, by its suffix, and the reward model's scores of n replies. weights,
    scorer: shapes."""
    settings = job.settings
    compiled: Programs = {}
    for entry in entries(settings):
        if f"sample{entry.suffix}" in compiled:
            continue
        drawn = of_replies(job, entry.n)
        sampled = how(job, entry)
        compiled |= {
            f"sample{entry.suffix}": candidates.program(job, model, weights, sampled, settings.batch_size),
            f"logps{entry.suffix}": rows.logps_program(job, model, weights, drawn, entry.n, sampled.temperature),
        }
        if entry.n > 1 and scorer is not None:
            compiled["score_best"] = rows.scoring_program(job, model, scorer, drawn, entry.n)
    return compiled


def of_replies(job: Job, n: int) -> Batch:
    """Shapes of rows of a prompt and n replies, as many as are scored at a time."""
    return shapes.batch(job, job.settings.scored_rows, *shapes.sampled_length(job, job.settings, n))


@dataclasses.dataclass(frozen=True)
class Several:
    """n replies to every prompt. rows: prompts with n replies each. logps: f32 [prompts,n], the policy's, summed, at
    the sampling temperature."""

    replies: Replies
    rows: Encoded
    logps: np.ndarray


def several(
    job: Job, compiled: Programs, weights: Callable[[], PyTree], prompts: Encoded, entry: Entry, of: Sequence[str]
) -> Several:
    """Draws n replies to every prompt; the first is what one reply alone would be. of: what the weights are."""
    sampler = compiled[f"sample{entry.suffix}"]
    drawn = candidates.sample_all(job, sampler, weights, prompts, how(job, entry), job.settings.batch_size, of)
    read = candidates.with_replies(prompts, drawn.tokens)
    logps = rows.compute(job, compiled[f"logps{entry.suffix}"], weights, read, job.settings.scored_rows, of)
    return Several(drawn, read, logps)


def best(scores: np.ndarray) -> np.ndarray:
    """Which of the replies to each prompt scores highest, i64 [prompts]: the first of equals; one without a score
    (NaN) is below all others. scores: f32 [prompts,n]."""
    return np.argmax(np.where(np.isnan(scores), -np.inf, scores), axis=1)


def kl_bound(n: int) -> float:
    """Nats by which the best of n replies is at most away from the policy that drew them."""
    return math.log(n) - (n - 1) / n
