"""A policy's weights and encoded prompts enter; sampled replies leave, as tokens and texts on the host.

The jitted sampler with the settings of a stage; what PPO, the split and the evaluation have in common.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mpo_jax import sampling, sharding
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import FILLER
from mpo_jax.errors import InputError
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job


def sampling_config(job: Job, settings: Any, n: int) -> SamplingConfig:
    """How a stage samples: its keys, with the base model's own stop ids. InputError for what the model can't do with
    prompts as long as the data's limits allow."""
    how = SamplingConfig(
        temperature=settings.temperature,
        top_k=settings.top_k or None,
        top_p=settings.top_p if 0 < settings.top_p < 1 else None,
        min_new_tokens=settings.min_new_tokens,
        max_new_tokens=settings.max_new_tokens,
        n=n,
        stop_ids=jobs.stop_ids(job),
    )
    how.check(jobs.model(job), jobs.prompt_limit(job))
    return how


@functools.lru_cache(maxsize=4)
def sampler(model: ModelConfig, settings: SamplingConfig, mesh, everywhere: bool = False):
    """Jitted `(weights, prompts, seed, round) -> Rollout`; with `everywhere`, the result is on every device whole.

    The same function for the same arguments, so that several policies are sampled with one compiled program."""
    where = sharding.replicated(mesh) if everywhere else sharding.batch_sharding(mesh)
    return jax.jit(functools.partial(sampling.sample, model, settings), out_shardings=where)


@dataclasses.dataclass(frozen=True)
class Replies:
    """Sampled replies on the host. rows: i64 [prompts], indices into the encoded prompts. tokens: a list of N arrays
    for each. logps: f32 [prompts,N], summed. finished: bool [prompts,N]."""

    rows: np.ndarray
    tokens: list[list[np.ndarray]]
    logps: np.ndarray
    finished: np.ndarray

    def texts(self, tokenizer) -> list[list[str]]:
        """As text, without special tokens."""
        return [[tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in each] for each in self.tokens]


def sample_all(
    job: Job, model: ModelConfig, weights, encoded: Encoded, settings: SamplingConfig, batch_size: int, seed: int
) -> Replies:
    """N replies to each row's prompt, in the rows' own order; equal on every process."""
    if not len(encoded):
        raise InputError("no prompt to sample replies to")
    loader = prompt_loader(job, encoded, batch_size, shuffle=False)
    step = sampler(model, settings, job.mesh, everywhere=True)
    tokens: list[list[np.ndarray]] = [[] for _ in range(len(encoded))]
    logps = np.zeros((len(encoded), settings.n), np.float32)
    finished = np.zeros((len(encoded), settings.n), bool)
    with loader.batches(0, loader.steps_per_epoch) as stream:
        for number, batch in enumerate(stream):
            _, rows = loader.rows(number)
            rollout = jax.device_get(step(weights, batch, seed, 0))
            replies = reply_tokens(rollout, settings)
            for place, row in enumerate(rows):
                if row != FILLER:
                    tokens[row] = replies[place]
                    logps[row] = rollout.logps[place].sum(axis=-1)
                    finished[row] = rollout.finished[place]
    return Replies(np.arange(len(encoded)), tokens, logps, finished)


def prompt_loader(job: Job, encoded: Encoded, batch_size: int, **options):
    """Batches of left-padded prompts."""
    return jobs.loader(job, encoded, batch_size, form="slots", **options)


def reply_tokens(rollout, settings: SamplingConfig) -> list[list[np.ndarray]]:
    """The real tokens of each reply of a rollout on the host: a list of N arrays for each row."""
    rows = rollout.batch.tokens.shape[0]
    shape = (rows, settings.n, settings.max_new_tokens)
    start = rollout.batch.tokens.shape[1] - settings.n * settings.max_new_tokens
    tokens = np.asarray(rollout.batch.tokens)[:, start:].reshape(shape)
    real = np.asarray(rollout.batch.segments)[:, start:].reshape(shape) > 0
    return [[tokens[row, n][real[row, n]] for n in range(settings.n)] for row in range(rows)]
