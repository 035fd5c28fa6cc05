"""A model and encoded rows enter; a number for each reply of every row leaves: the reward model's score, or the
log-probability under a policy.

What the reward stage, the split, DPO's reference, the evaluation and the judge have in common.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from mpo_jax import scoring, sharding
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.data.plan import FILLER
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages import shards
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Program
from mpo_jax.types import Batch, PyTree


@functools.lru_cache(maxsize=4)
def scoring_step(model: ModelConfig, replies: int, mesh):
    """Jitted `(weights, batch) -> f32 [B,replies]`, on every device: the scores of a batch's replies.

    The same function for the same arguments, so that several models score with one compiled program."""

    def score(weights, batch):
        return scoring.response_scores(model, weights, batch, replies)

    return jax.jit(score, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=4)
def logps_step(model: ModelConfig, replies: int, mesh, temperature: float = 1.0):
    """Jitted `(weights, batch) -> f32 [B,replies]`, on every device: the summed log-probs of a batch's replies at a
    temperature (at 1 where sampling is greedy). The same function for the same arguments."""
    heat = temperature or 1.0

    def logps(weights, batch):
        return scoring.response_logps(model, weights, batch, heat).seq_logps(replies)

    return jax.jit(logps, out_shardings=sharding.replicated(mesh))


def scoring_program(job: Job, model: ModelConfig, weights: PyTree, rows: Batch, replies: int) -> Program:
    """`scoring_step` on rows like these. weights: shapes."""
    step = scoring_step(model, replies, job.mesh)
    return Program(step, (weights, rows), shapes.forward(model, rows), per="batch")


def logps_program(
    job: Job, model: ModelConfig, weights: PyTree, rows: Batch, replies: int, temperature: float = 1.0
) -> Program:
    """`logps_step` on rows like these. weights: shapes."""
    step = logps_step(model, replies, job.mesh, temperature)
    return Program(step, (weights, rows), shapes.forward(model, rows), per="batch")


def compute(
    job: Job,
    program: Program,
    weights: PyTree | Callable[[], PyTree],
    encoded: Encoded,
    batch_size: int,
    of: Sequence[str] | None = None,
    **options,
) -> np.ndarray:
    """The program's numbers of all rows, f32 [rows,N], in the rows' own order; equal on every process.

    weights: or what loads them, called when the first batch needs them. of: what the program and the weights are, under
    which a stage that was killed finds what it has computed, see `shards.over`. options: of the loader."""
    loader = _loader(job, encoded, batch_size, **options)
    loaded = shards.loaded(weights)
    numbers = np.full((len(encoded), encoded.replies), np.nan, np.float32)

    def number(batch: Batch) -> Call:
        return program.function, (loaded(), batch)

    def read(found: jax.Array) -> shards.Arrays:
        return {"numbers": np.asarray(found)}

    program_of = None if of is None else [program.function.__name__, *of]
    for rows, found in shards.over(job, loader, "score", program_of, number, read):
        real = rows != FILLER
        numbers[rows[real]] = found["numbers"][real]
    return numbers


def calls(job: Job, program: Program, encoded: Encoded, batch_size: int) -> Iterator[Call]:
    """What `compute` calls, known before the weights are."""
    weights, _ = program.arguments
    for batch in _loader(job, encoded, batch_size).shapes():
        yield program.function, (weights, batch)


def unread(encoded: Encoded) -> np.ndarray:
    """Stands for numbers of replies, f32 [rows,N], where only their shapes are asked for."""
    return np.zeros((len(encoded), encoded.replies), np.float32)


def _loader(job: Job, encoded: Encoded, batch_size: int, **options) -> Loader:
    # Rows of many samples may be longer than those of the data; no position in them is.
    return jobs.loader(job, encoded, batch_size, shuffle=False, max_length=None, **options)
