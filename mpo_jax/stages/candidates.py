"""A policy's weights and encoded prompts enter; sampled replies leave, and pairs of them: sampled, labelled, paired.

The jitted sampler with the settings of a stage; what pairs, the split, PPO and the evaluation have in common.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import annotated_types
import jax
import numpy as np

from mpo_jax import sampling, sharding
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.data.plan import FILLER
from mpo_jax.data.tokenizer import Conventions
from mpo_jax.errors import InputError
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig
from mpo_jax.scorers import preferences
from mpo_jax.scorers.names import Scorer, Scorers
from mpo_jax.settings import Amount, setting
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages import shards
from mpo_jax.stages.base import Sampling
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Call, Program
from mpo_jax.types import Batch, PyTree, Rollout

MOST_BATCHES = 8
"""Of prompts that one call of the sampler replies to; its end finds rows empty, as no prompt waits any more."""
_ENDING = 0.5  # what that costs: of a batch's reply slots, in tokens of a prompt


class Pairing(Sampling):
    """How a policy's own replies become preference pairs."""

    labeller: Annotated[Scorer, Scorers()] = setting("vader", "the scorer that decides which reply is better")
    label_temperature: Amount = setting(
        0.1, "temperature of the Bradley-Terry noise in the labels; 0: no noise", unit="the labeller's units"
    )
    samples: Annotated[int, annotated_types.Interval(ge=2, le=4096)] = setting(
        4, "replies that are sampled to each prompt", unit="replies"
    )
    pairing: Literal["best_worst", "all"] = setting(
        "best_worst", "which replies are paired: the best with the worst, or every two"
    )

    @property
    def samples_pairs(self) -> bool:
        """Whether the pairs that the stage leaves are sampled, rather than the data's own."""
        return True


@dataclasses.dataclass(frozen=True)
class Scored:
    """Pairs, chosen first, with their scores f32 [pairs,2]."""

    encoded: Encoded
    scores: np.ndarray


def sampling_config(
    job: Job,
    n: int,
    *,
    temperature: float,
    max_new_tokens: int,
    top_k: int = 0,
    top_p: float = 0.0,
    min_new_tokens: int = 0,
    key: str = "",
) -> SamplingConfig:
    """How a stage samples, with the base model's own stop ids. InputError for what the model can't do with prompts as
    long as the data's limits allow. key: where those settings stand beneath the stage's."""
    try:
        how = SamplingConfig(
            temperature=temperature,
            top_k=top_k or None,
            top_p=top_p if 0 < top_p < 1 else None,
            min_new_tokens=min_new_tokens,
            max_new_tokens=max_new_tokens,
            n=n,
            stop_ids=jobs.stop_ids(job),
        )
        how.check(jobs.model(job), jobs.prompt_limit(job))
    except InputError as error:
        raise InputError(f"stages.{job.name}.{key}{error}") from None
    return how


def of_settings(job: Job[Sampling], n: int) -> SamplingConfig:
    """How a stage samples by its settings."""
    settings = job.settings
    return sampling_config(
        job,
        n,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_new_tokens=settings.min_new_tokens,
    )


def check_pairs(job: Job[Pairing]) -> None:
    """InputError where no pairs can be sampled; nothing is loaded."""
    settings = job.settings
    of_settings(job, settings.samples)
    prompt, reply, longest = jobs.prompt_limit(job), settings.max_new_tokens, job.config.data.max_length
    if prompt + 2 * reply > longest:
        hint = f", or set data.max_prompt={longest - 2 * reply}" if longest > 2 * reply else ""
        raise job.error(
            "max_new_tokens",
            f"prompts of {prompt} tokens and two replies of {reply} make {prompt + 2 * reply}, above data.max_length "
            f"{longest}; lower it{hint}",
        )


# Sampling -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def sampler(model: ModelConfig, settings: SamplingConfig, mesh, everywhere: bool = False, rows: int | None = None):
    """Jitted `(weights, prompts, seed, round) -> Rollout`; with `everywhere`, the result is on every device whole.
    rows: prompts that are decoded at a time, others waiting for their places; None: all.

    The same function for the same arguments, so that several policies are sampled with one compiled program."""
    where = sharding.replicated(mesh) if everywhere else sharding.batch_sharding(mesh)

    def sample(weights, prompts, seed, round_):
        return sampling.sample(model, settings, weights, prompts, seed, round_, rows)

    return jax.jit(sample, out_shardings=where)


def drawn_shapes(job: Job, how: SamplingConfig, prompts: Batch) -> Rollout:
    """Shapes of what `sampler` gives of prompts, or of their shapes, as they lie when it is not everywhere."""
    return shapes.on_rows(job, sampling.shapes_of(how, prompts))


def seed_and_round(job: Job) -> tuple[jax.Array, jax.Array]:
    """The run's seed and round 0, as the sampler takes them: i32 on every device."""
    return shapes.number(job, job.seed), shapes.number(job, 0)


def program(
    job: Job, model: ModelConfig, weights: PyTree, how: SamplingConfig, batch_size: int, held: PyTree = ()
) -> Program:
    """`sampler` on as many prompts as a call may be given, as long as the data allows; its result everywhere. weights:
    shapes. batch_size: prompts that are decoded at a time."""
    prompts = shapes.batch(job, MOST_BATCHES * batch_size, shapes.prompt_length(job), 0)
    draw = sampler(model, how, job.mesh, everywhere=True, rows=batch_size)
    arguments = (weights, prompts, shapes.scalar(job), shapes.scalar(job))
    return Program(draw, arguments, shapes.decode(model, how, prompts, MOST_BATCHES), held, per="batch")


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
    job: Job,
    program: Program,
    weights: PyTree | Callable[[], PyTree],
    encoded: Encoded,
    settings: SamplingConfig,
    batch_size: int,
    of: Sequence[str] | None = None,
) -> Replies:
    """N replies to each row's prompt, in the rows' own order; equal on every process.

    program: see `program`. weights: or what loads them, called when the first batch needs them. of: whose weights they
    are, under which a stage that was killed finds what it has sampled, see `shards.over`."""
    if not len(encoded):
        raise InputError(f"stages.{job.name}: no prompt to sample replies to")
    loader = waiting_prompts(job, encoded, batch_size, settings)
    loaded = shards.loaded(weights)
    tokens: list[list[np.ndarray]] = [[] for _ in range(len(encoded))]
    logps = np.zeros((len(encoded), settings.n), np.float32)
    finished = np.zeros((len(encoded), settings.n), bool)

    numbers = seed_and_round(job)

    def draw(batch: Batch) -> Call:
        return program.function, (loaded(), batch, *numbers)

    def read(drawn: Rollout) -> shards.Arrays:
        rollout = jax.device_get(drawn)
        replies = [ids for row in reply_tokens(rollout, settings) for ids in row]
        return {
            "tokens": np.concatenate(replies),
            "lens": np.array([len(ids) for ids in replies], np.int32),
            "logps": np.stack([row.sum(axis=-1) for row in rollout.logps]),
            "finished": np.asarray(rollout.finished),
        }

    drawn = None if of is None else [*of, repr(settings)]
    for rows, found in shards.over(job, loader, "sample", drawn, draw, read):
        replies = np.split(found["tokens"], np.cumsum(found["lens"])[:-1])
        for place, row in enumerate(rows):
            if row != FILLER:
                tokens[row] = replies[place * settings.n : (place + 1) * settings.n]
                logps[row] = found["logps"][place]
                finished[row] = found["finished"][place]
    return Replies(np.arange(len(encoded)), tokens, logps, finished)


def calls(job: Job, program: Program, encoded: Encoded, settings: SamplingConfig, batch_size: int) -> Iterator[Call]:
    """What `sample_all` calls, known before the weights are."""
    weights, _, *numbers = program.arguments
    for prompts in waiting_prompts(job, encoded, batch_size, settings).shapes():
        yield program.function, (weights, prompts, *numbers)


def prompt_loader(job: Job, encoded: Encoded, batch_size: int, **options):
    """Batches of left-padded prompts."""
    return jobs.loader(job, encoded, batch_size, form="slots", **options)


def waiting_prompts(job: Job, encoded: Encoded, batch_size: int, settings: SamplingConfig) -> Loader:
    """The prompts of several batches for each call of the sampler, rows of fillers last on every device: so many that
    columns that only pad prompts and rows that stand empty at the end of a call cost the least together."""

    def of(batches: int) -> Loader:
        return prompt_loader(job, encoded, batches * batch_size, shuffle=False, dealt=True)

    def cost(loader: Loader) -> float:
        plan = loader.plan(0)
        lengths = np.array([bucket.length for bucket in plan.buckets])[plan.bucket]
        empty = _ENDING * batch_size * settings.n * settings.max_new_tokens
        return float(np.sum((plan.rows != FILLER).sum(axis=1) * lengths + empty))

    powers = [1 << power for power in range(MOST_BATCHES.bit_length())]
    return min(map(of, powers), key=cost)


def reply_tokens(rollout, settings: SamplingConfig) -> list[list[np.ndarray]]:
    """The real tokens of each reply of a rollout on the host: a list of N arrays for each row."""
    rows = rollout.batch.tokens.shape[0]
    shape = (rows, settings.n, settings.max_new_tokens)
    start = rollout.batch.tokens.shape[1] - settings.n * settings.max_new_tokens
    tokens = np.asarray(rollout.batch.tokens)[:, start:].reshape(shape)
    real = np.asarray(rollout.batch.segments)[:, start:].reshape(shape) > 0
    return [[tokens[row, n][real[row, n]] for n in range(settings.n)] for row in range(rows)]


def rows_of_rollout(rollout, settings: SamplingConfig, known: Conventions) -> tuple[np.ndarray, Encoded]:
    """Which rows of a rollout on the host are real, bool [B], and those as encoded rows of n replies."""
    real = np.asarray(rollout.batch.weight) > 0
    tokens, segments = np.asarray(rollout.batch.tokens), np.asarray(rollout.batch.segments)
    replies = reply_tokens(rollout, settings)
    pieces = [piece for row in np.flatnonzero(real) for piece in (tokens[row][segments[row] == 1], *replies[row])]
    ids = [np.asarray(getattr(rollout.batch, name))[real] for name in ("id", "prompt_id")]
    return real, encode.assemble(pieces, settings.n, known, "rollout", id=ids[0], prompt_id=ids[1])


# Pairs ----------------------------------------------------------------------------------------------------------------


def with_replies(prompts: Encoded, replies: list[list[np.ndarray]]) -> Encoded:
    """Prompts with their sampled replies, rows of n."""
    pieces = [piece for row, each in enumerate(replies) for piece in (prompts.row(row)[0], *each)]
    return encode.assemble(
        pieces, len(replies[0]), prompts.conventions, prompts.key, id=prompts.id, prompt_id=prompts.prompt_id
    )


def pair_up(
    candidates: Encoded, scores: np.ndarray, gold: np.ndarray, pairing: str, temperature: float, seed: int
) -> Scored:
    """Pairs of each row's replies. best_worst: by `gold`; all: every two. Equal replies make no pair, nor do those that
    have no score, which is NaN.

    scores, gold: f32 [rows,N]. temperature: of the Bradley-Terry noise with which `gold` says who wins; 0: none.
    """
    scored = ~np.isnan(scores + gold)
    pieces: list[np.ndarray] = []
    pair_scores: list[np.ndarray] = []
    prompt_ids: list[int] = []
    for row in range(len(candidates)):
        prompt, *answers = candidates.row(row)
        order = [int(place) for place in np.argsort(-gold[row], kind="stable") if scored[row, place]]
        if pairing == "best_worst":
            choices = [(order[0], order[-1])] if order else []
        else:
            choices = list(itertools.combinations(sorted(order), 2))
        for a, b in choices:
            if np.array_equal(answers[a], answers[b]):
                continue
            number = np.array([len(pair_scores)])
            if not preferences.first_wins(gold[row, [a]], gold[row, [b]], temperature, number, seed)[0]:
                a, b = b, a
            pieces += [prompt, answers[a], answers[b]]
            pair_scores.append(scores[row, [a, b]])
            prompt_ids.append(candidates.prompt_id[row])
    if not pair_scores:
        unscored = int(np.sum(~scored))
        why = f" ({unscored} of {scored.size} have no score)" if unscored else ""
        raise InputError(f"no two sampled replies to a prompt differ{why}; raise temperature or samples")
    encoded = encode.assemble(
        pieces,
        2,
        candidates.conventions,
        candidates.key,
        id=np.arange(len(pair_scores)),
        prompt_id=np.array(prompt_ids),
    )
    return Scored(encoded, np.array(pair_scores, np.float32))
