"""A rollout enters; the scores that others than the run's reward model alone give it leave.

Models on the device that read the run's own tokens score the rollout where it lies, as the reward model does, and the
host waits for nothing. All others are asked on the host, about text or about tokens of their own.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mpo_jax import processes, sharding
from mpo_jax.data.tokenizer import conventions
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.scorers.names import OWN, terms
from mpo_jax.stages import candidates, scores
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job
from mpo_jax.stages.ppo import experience as experiences
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.stages.programs import Program, Programs
from mpo_jax.types import PyTree, Rollout

Ask = Callable[[PyTree, Rollout], Any]
"""`(frozen, rollout) -> f32 [B,N]`, on the device or on the host: what others say, NaN where a reply has no score."""


def programs(job: Job[Settings], model: ModelConfig, frozen: PyTree, drawn: Mapping[int, Rollout]) -> Programs:
    """Scoring, on the device, that is not part of another program: the reward model's where it is one part of a sum,
    and that of models of others. frozen, drawn: shapes; of rollouts, by their replies to a prompt."""
    settings = job.settings
    length, window = shapes.sampled_length(job, settings, 1)
    read = {n: shapes.batch(job, settings.batch_size, length + (n - 1) * window, n * window) for n in drawn}
    compiled: Programs = {}
    for key, some in (("scorer", drawn), ("gold", {1: drawn[1]})):
        compiled |= _on_rollouts(job, key, model, frozen, some)
        brought = scores.of_tokens(job, key)
        compiled |= scores.programs(job, key, {n: read[n] for n in some}, brought)
    return compiled


def _on_rollouts(
    job: Job[Settings], key: str, model: ModelConfig, frozen: PyTree, drawn: Mapping[int, Rollout]
) -> Programs:
    """`(frozen, rollout) -> scores`, by the scorers of a setting that read the run's own tokens."""
    steps: dict[str, tuple[Any, ModelConfig, PyTree]] = {}
    if job.settings.asks and scores.uses_own(getattr(job.settings, key)):
        steps[OWN] = (scoring_step(model, job.mesh), model, frozen)
    for name, found in scores.of_tokens(job, key).items():
        architecture = jobs.computed(job, found.architecture)
        weights = {"base": {}, "reward": scores.abstract_weights(job, name)}
        steps[name] = (scoring_step(architecture, job.mesh, found.pad_id), architecture, weights)
    labels = _labels(job, key)
    return {
        f"{labels[name]}_of_{replies}": Program(step, (weights, rollout), shapes.forward(scored_by, rollout.batch))
        for name, (step, scored_by, weights) in steps.items()
        for replies, rollout in drawn.items()
    }


def _labels(job: Job[Settings], key: str) -> dict[str, str]:
    """What the names of the programs of each scorer on the device begin with."""
    return {OWN: "reward"} | dict(scores.models(job.settings, key))


def scoring_step(model: ModelConfig, mesh, pad_id: int | None = None):
    """Jitted `experience.score`. pad_id: the token that a reply is not scored at."""

    def score(frozen, rollout):
        read = rollout if pad_id is None else experiences.without_end(rollout, pad_id)
        return experiences.score(model, frozen, read)

    return jax.jit(score, out_shardings=sharding.batch_sharding(mesh))


@contextlib.contextmanager
def opened(
    job: Job[Settings], key: str, tokenizer: Any, compiled: Programs
) -> Iterator[Callable[[SamplingConfig], Ask]]:
    """`how they are sampled -> Ask` about rollouts, by the scorers of a setting, until the context ends.

    compiled: the stage's programs. InputError, by the setting, for whatever a scorer can't do."""
    named = terms(getattr(job.settings, key))
    models = scores.of_tokens(job, key)
    weights = {name: {"base": {}, "reward": scores.load_weights(job, found)} for name, found in models.items()}

    labels = _labels(job, key)

    def on_device(how: SamplingConfig) -> dict[str, Ask]:
        """Each scorer that reads rollouts."""

        def of(name: str) -> Ask:
            step = compiled[f"{labels[name]}_of_{how.n}"].function
            return lambda frozen, rollout: step(weights.get(name, frozen), rollout)

        return {name: of(name) for name in named if name == OWN or name in weights}

    if len(weights) == 1 and list(named.values()) == [1.0]:
        yield lambda how: next(iter(on_device(how).values()))
        return
    known = conventions(tokenizer)
    size, brought = job.settings.batch_size, {OWN, *weights}
    with scores.opened(job, key, tokenizer, compiled, size, steady=True, brought=brought) as score:
        yield lambda how: _on_host(score, how, known, on_device(how))


def _on_host(score: scores.Score, how: SamplingConfig, known: Any, on_device: Mapping[str, Ask]) -> Ask:
    """Asks open scorers about a rollout; rows that only fill a batch are not asked about, and get 0."""

    def ask(frozen: PyTree, rollout: Rollout) -> np.ndarray:
        given = {name: each(frozen, rollout) for name, each in on_device.items()}  # before the host waits for anything
        real, rows = candidates.rows_of_rollout(processes.on_host(rollout), how, known)

        def scored(name: str) -> Callable[[], np.ndarray]:
            return lambda: np.asarray(processes.on_host(given[name]))[real]

        found = np.zeros((len(real), how.n), np.float32)
        found[real] = score(rows, {name: scored(name) for name in given})
        return found

    return ask


def on_host(asked: Any) -> np.ndarray:
    """What was asked, f32 [B,N], whole on every process."""
    return np.asarray(processes.on_host(asked)) if isinstance(asked, jax.Array) else asked
