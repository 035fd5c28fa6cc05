"""Policies of one base model enter; a policy whose weights are the weighted mean of theirs leaves.

Model soups (Wortsman et al. 2022, arXiv 2203.05482); for RLHF WARP (Ramé et al. 2024, arXiv 2406.16768). Weights may
lie outside 0 to 1: (-0.5, 1.5) goes on from the first through the second (ExPO, Zheng et al. 2024, arXiv 2404.16792).
"""

from typing import Any

import jax
import jax.numpy as jnp
import pydantic

from mpo_jax import settings as declared
from mpo_jax import sharding
from mpo_jax.artifacts import POLICY
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models import lora
from mpo_jax.run import StageSettings
from mpo_jax.settings import Names, Numbers, role, setting
from mpo_jax.stages import job as jobs
from mpo_jax.stages.base import Stage
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs
from mpo_jax.types import PyTree


class Settings(StageSettings):
    """A mean of policies' weights."""

    policies: Names = role(POLICY, ("sft", "dpo"), "the policies that are blended")
    weights: Numbers = setting((), "the weight of each policy, with sum 1; empty: all the same")

    @property
    def shares(self) -> tuple[float, ...]:
        return self.weights or (1 / len(self.policies),) * len(self.policies)

    @pydantic.model_validator(mode="after")
    def _one_each(self):
        if self.weights and len(self.weights) != len(self.policies):
            raise declared.wrong(
                "weights", f"{len(self.weights)} of {len(self.policies)} policies; expected a weight for each"
            )
        if self.policies and abs(sum(self.shares) - 1) > 1e-6:
            raise declared.wrong("weights", f"{sum(self.shares):g} in sum; expected 1")
        return self


def check(job: Job[Settings]) -> None:
    """Nothing beyond the settings' own checks."""


def programs(job: Job[Settings]) -> Programs:
    """None: each sum is one operation, and adapters are small."""
    return {}


def mean(weights: PyTree, shares: tuple[float, ...]) -> PyTree:
    """f32, as the parameters lie: the sum of share * weights over an iterable of policies' weights, one at a time."""
    total = None
    for share, each in zip(shares, weights, strict=True):
        part = jax.tree.map(lambda x, share=share: jnp.float32(share) * x, each)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def run(job: Job[Settings]) -> dict[str, Any]:
    """Writes the blended weights; two sets of weights lie in memory at a time. Under LoRA it is the adapters' products
    that are blended, as near as adapters of the same rank come to it; all of them lie in memory."""
    model = jobs.model(job)
    shares = job.settings.shares
    loaded = (jobs.load_weights(job, artifact, model) for artifact in job.inputs["policies"])
    told: dict[str, Any] = {
        "policies": {artifact.name: share for artifact, share in zip(job.inputs["policies"], shares, strict=True)}
    }
    words = f"{job.name} is {', '.join(f'{share:g} {name}' for name, share in told['policies'].items())}"
    if model.lora is None:
        jobs.save_weights(job, mean(loaded, shares))
    else:
        adapters = list(loaded)
        where = jax.tree.map(lambda leaf: leaf.sharding, adapters[0]), sharding.replicated(job.mesh)
        found, missing = jax.jit(lora.mean, static_argnums=1, out_shardings=where)(adapters, shares)
        jobs.save_weights(job, found)
        told["missing"] = float(missing)
        words += f"; its adapters of rank {model.lora.rank} miss {told['missing']:.2g} of the norm of the exact mean"
    jobs.say(words)
    return told


STAGE = Stage(
    kind="blend",
    settings=Settings,
    produces=POLICY,
    run=run,
    programs=programs,
    check=check,
    rows=lambda job, pairs, easy: 0.0,
    shown=Shown(figures=("policies.*",)),
)
