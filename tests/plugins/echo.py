"""A plugin: a kind of stage that writes down a policy's name, an objective, and a scorer. See tests/test_kinds.py."""

from typing import Any

import jax.numpy as jnp

from mpo_jax import artifacts
from mpo_jax.artifacts import POLICY, REPLIES
from mpo_jax.evaluation.sections import Shown
from mpo_jax.ops import preferences
from mpo_jax.ops.losses import Loss
from mpo_jax.ops.preferences import OBJECTIVES, Objective
from mpo_jax.run import StageSettings
from mpo_jax.scorers.names import SCORERS
from mpo_jax.settings import Count, role, setting
from mpo_jax.stages import kinds
from mpo_jax.stages.base import Stage
from mpo_jax.stages.job import Job


class Settings(StageSettings):
    """Writes down which policy it was given."""

    policy: str = role(POLICY, "sft", "the policy that is named")
    times: Count = setting(1, "how often it is written")


def run(job: Job[Settings]) -> dict[str, Any]:
    """Leaves echo.json."""
    names = [job.inputs["policy"].name] * job.settings.times
    artifacts.write_json(job.folder / "echo.json", names)
    return {"names": names}


def squared_hinge(policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta) -> Loss:
    """max(0, 1 - beta * log-ratio)^2."""
    _, pairs, metrics = preferences.dpo(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, weight, beta
    )
    margin = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return jnp.sum(weight * jnp.maximum(0.0, 1.0 - margin) ** 2), pairs, metrics


def shortest(prompts, replies) -> list[float]:
    """The shorter the better."""
    return [-float(len(reply)) for reply in replies]


OBJECTIVES["squared_hinge"] = Objective(squared_hinge)
SCORERS["shortest"] = shortest
STAGE = kinds.register(
    Stage(
        kind="echo",
        settings=Settings,
        produces=REPLIES,
        run=run,
        programs=lambda job: {},
        check=lambda job: None,
        rows=lambda job, pairs, easy: 0.0,
        shown=Shown(figures=("names",)),
    )
)
