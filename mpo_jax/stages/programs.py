"""A stage's settings and a mesh enter; every program that the stage compiles leaves, with the shapes it is called with.

The jitted functions are those that the stages run, from the same factories; the arguments are shapes of the largest
bucket: rows of data.max_length tokens, prompts of what a reply leaves of it. Letters as in `types`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax import sharding
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig, cache_widths
from mpo_jax.stages import dpo, loop, ppo, reward, rollouts, sft
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from mpo_jax.types import Batch, PyTree, TrainState


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a program computes at a time, for arithmetic. kind: train | forward | decode. rows, length, window: of a
    microbatch, over all devices (decode: prompts of `length`, `window` response slots). steps: of a decode loop.
    trained: bytes on one device of what gets gradients; trunks: models that run, and whose activations are kept for
    gradients. repeats: microbatches of one call."""

    model: ModelConfig
    kind: str
    rows: int
    length: int
    window: int
    steps: int = 0
    trained: int = 0
    trunks: int = 1
    accumulates: bool = False
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
    """function: jitted. arguments: ShapeDtypeStructs with shardings. held: what else lies in memory while it runs.
    per: how often the stage runs it, for each "step" of training, "batch" of its rows, or "evaluation"."""

    function: Any
    arguments: tuple
    extent: Extent
    held: PyTree = ()
    per: str = "step"

    @property
    def loop(self) -> int:
        """Iterations, at most, of a loop whose end the data decides: decoding has one for each width of its caches."""
        return cache_widths(self.extent.steps)[0] if self.extent.steps else 1


Programs = dict[str, Program]


def programs(job: Job) -> Programs:
    """What a stage compiles, in the order of use."""
    return KINDS[job.settings.kind](job, jobs.model(job))


# Stages ---------------------------------------------------------------------------------------------------------------


def _sft(job: Job, model: ModelConfig) -> Programs:
    params = jobs.abstract_weights(model, job.mesh)
    response = job.config.data.max_response
    rows = batch(job, job.settings.batch_size, _row_length(job, response), response)
    return _supervised(job, sft.make_loss(model), params, rows)


def _reward(job: Job, model: ModelConfig) -> Programs:
    params = jobs.abstract_weights(model, job.mesh, head=True)
    settings = job.settings
    margin = job.settings.margin
    rows = pairs(job, settings.batch_size, _made_by(job, "pairs"), margin=margin)
    scored = pairs(job, settings.score_batch or settings.batch_size, _made_by(job, "pairs"), margin=margin)
    score = Program(
        reward.scoring_step(model, 2, job.mesh),
        (jobs.abstract_base(job, model) | params, scored),
        _forward(model, scored),
        per="batch",
    )
    return _supervised(job, reward.make_loss(model, margin), params, rows) | {"score": score}


def _pairs(job: Job, model: ModelConfig) -> Programs:
    weights = jobs.abstract_base(job, model) | frozen_weights(job, model)
    return {"sample": _sample(job, model, weights, job.settings.samples, per="batch")}


def _split(job: Job, model: ModelConfig) -> Programs:
    settings = job.settings
    base = jobs.abstract_base(job, model)
    scorer = base | frozen_weights(job, model, head=True)
    found: dict[str, Program] = {}
    size = settings.score_batch or settings.batch_size
    if settings.pair_source in ("dataset", "both"):
        rows = pairs(job, size, _made_by(job, "pairs"))
        step = reward.scoring_step(model, 2, job.mesh)
        found["score"] = Program(step, (scorer, rows), _forward(model, rows), per="batch")
    if settings.pair_source in ("sampled", "both"):
        weights = base | frozen_weights(job, model)
        found["sample"] = _sample(job, model, weights, settings.samples, scorer, "batch")
        length, window = _sampled_length(job, settings, settings.samples)
        rows = batch(job, size, length, window)
        step = reward.scoring_step(model, settings.samples, job.mesh)
        found["score_samples"] = Program(step, (scorer, rows), _forward(model, rows), per="batch")
    return found


def _dpo(job: Job, model: ModelConfig) -> Programs:
    settings = job.settings
    params = jobs.abstract_weights(model, job.mesh)
    made_by = _made_by(job, "pairs")
    loss = dpo.make_loss(model, settings.algorithm, settings.beta, settings.label_smoothing, settings.sft)
    weights = jobs.abstract_base(job, model) | frozen_weights(job, model)
    unread = pairs(job, settings.batch_size, made_by)
    reference = Program(dpo.make_reference(model, job.mesh), (weights, unread), _forward(model, unread), per="batch")
    rows = pairs(job, settings.batch_size, made_by, ref_logps=True)
    return {"reference": reference} | _supervised(job, loss, params, rows)


def _ppo(job: Job, model: ModelConfig) -> Programs:
    settings = job.settings
    ppo.check(settings)
    sampling = ppo.sampling_config(job)
    rules = ppo.make_rules(job, {"mean": 0.0, "std": 1.0} if settings.normalise_scores else {})
    params = {"policy": jobs.abstract_weights(model, job.mesh)}
    if settings.algorithm == "ppo":
        critic = jobs.abstract_weights(model, job.mesh, head=True)
        params["value"] = {"head": critic["head"]} if settings.critic == "shared" else critic
    frozen = {"base": jobs.abstract_base(job, model)} | {
        role: frozen_weights(job, model, head=role == "reward")
        for role in ("reference", "reward", "sft")
        if role in job.inputs
    }
    optimizer, _ = ppo.make_optimizer(settings, steps=1000)
    state = loop.abstract_state(optimizer, params, job.mesh, ppo.first_extra(settings))
    weights = frozen["base"] | params["policy"]
    prompts = batch(job, settings.batch_size, prompt_length(job), 0)
    held = (state, frozen)
    draw, arguments = rollouts.sampler(model, sampling, job.mesh), (weights, prompts, _scalar(job), state.step)
    rollout = Program(draw, arguments, _decode(model, sampling, prompts), held)
    drawn = on_rows(job, draw.eval_shape(*arguments))
    given = (
        None if settings.labeller == "reward" else _rows_of(job, (settings.batch_size, settings.samples), jnp.float32)
    )
    prepare = ppo.scoring_step(model, rules, job.mesh)
    whole = (params, frozen, drawn, given, state.extra["kl_coefficient"])
    experience = Program(prepare, whole, _forward(model, drawn.batch, len(params) + len(frozen) - 1), held)
    made, _ = prepare.eval_shape(*whole)
    update = Program(
        ppo.update_step(settings, model, rules, optimizer, state, job.mesh),
        (state, frozen, on_rows(job, made), _scalar(job, jnp.float32)),
        _train(job, model, state, drawn.batch, settings.batch_size // settings.minibatches),
    )
    return {"rollout": rollout, "experience": experience, "update": update}


def _evaluate(job: Job, model: ModelConfig) -> Programs:
    settings = job.settings
    base = jobs.abstract_base(job, model)
    scorer = base | frozen_weights(job, model, head=True)
    length, window = _sampled_length(job, settings, 1)
    rows = batch(job, settings.batch_size, length, window)
    return {
        "sample": _sample(job, model, base | frozen_weights(job, model), 1, per="batch"),
        "score": Program(reward.scoring_step(model, 1, job.mesh), (scorer, rows), _forward(model, rows), per="batch"),
    }


KINDS: dict[str, Callable[[Job, ModelConfig], Programs]] = {
    "sft": _sft,
    "reward": _reward,
    "pairs": _pairs,
    "split": _split,
    "dpo": _dpo,
    "ppo": _ppo,
    "evaluate": _evaluate,
    "judge": lambda job, model: {},  # asks an endpoint, or scores a few rows as dpo's reference does
}


def _supervised(job: Job, loss: loop.Loss, params: PyTree, rows: Batch) -> Programs:
    """The step and the evaluation of a training that minimises `loss`."""
    model = jobs.model(job)
    frozen = {"base": jobs.abstract_base(job, model)}
    optimizer, _ = loop.make_optimizer(job.settings, 1000)
    state = loop.abstract_state(optimizer, params, job.mesh)
    step = loop.supervised_step(loss, optimizer, job.settings, state, job.mesh)
    judged = Program(
        loop.evaluation_step(loss), (state.params, frozen, rows), _forward(model, rows), (state, frozen), "evaluation"
    )
    extent = _train(job, model, state, rows, job.settings.batch_size)
    return {"train": Program(step, (state, frozen, rows), extent), "evaluate": judged}


def _sample(job: Job, model: ModelConfig, weights: PyTree, n: int, held: PyTree = (), per: str = "step") -> Program:
    settings = job.settings
    how = rollouts.sampling_config(job, settings, n)
    prompts = batch(job, settings.batch_size, prompt_length(job), 0)
    draw = rollouts.sampler(model, how, job.mesh, everywhere=True)
    return Program(draw, (weights, prompts, _scalar(job), _scalar(job)), _decode(model, how, prompts), held, per)


def _train(job: Job, model: ModelConfig, state: TrainState, rows: Batch, update: int) -> Extent:
    part = job.settings.microbatch or update
    return Extent(
        model,
        "train",
        part,
        rows.tokens.shape[1],
        rows.window,
        trained=device_bytes(state.params),
        trunks=2 if "value" in state.params and "head" not in state.params else 1,
        accumulates=part < update or job.settings.kind == "ppo",
        repeats=update // part * (job.settings.get("inner_epochs", 1) * job.settings.get("minibatches", 1)),
    )


def _forward(model: ModelConfig, rows: Batch, trunks: int = 1) -> Extent:
    size, length = rows.tokens.shape
    return Extent(model, "forward", size, length, rows.window, trunks=trunks)


def _decode(model: ModelConfig, how: SamplingConfig, prompts: Batch) -> Extent:
    window = how.n * how.max_new_tokens
    size, length = prompts.tokens.shape
    return Extent(model, "decode", size, length, window, steps=how.max_new_tokens)


# Shapes ---------------------------------------------------------------------------------------------------------------


def frozen_weights(job: Job, model: ModelConfig, head: bool = False) -> PyTree:
    return jobs.abstract_weights(model, job.mesh, head=head, dtype=jobs.frozen_dtype(job))


def prompt_length(job: Job) -> int:
    """P: the longest prompt, or what one reply leaves of a row."""
    return _up(jobs.prompt_limit(job), job.config.data.multiple)


def pairs(job: Job, rows: int, made_by: Any, ref_logps: bool = False, margin: bool = False) -> Batch:
    """Rows of a prompt and two replies: from the data, or as long as the stage `made_by` samples them."""
    data = job.config.data
    if made_by is None:
        window = 2 * data.max_response
        return batch(job, rows, _row_length(job, window), window, ref_logps, margin)
    return batch(job, rows, *_sampled_length(job, made_by, 2), ref_logps, margin)


def batch(job: Job, rows: int, length: int, window: int, ref_logps: bool = False, margin: bool = False) -> Batch:
    """An abstract batch of the loader's form."""
    sharding.check_batch(rows, job.mesh)
    columns, vector = (rows, length), (rows,)
    return Batch(
        tokens=_rows_of(job, columns, jnp.int32),
        positions=_rows_of(job, columns, jnp.int32),
        segments=_rows_of(job, columns, jnp.int32),
        id=_rows_of(job, vector, jnp.int32),
        prompt_id=_rows_of(job, vector, jnp.int32),
        weight=_rows_of(job, vector, jnp.float32),
        window=min(_up(window, job.config.data.multiple), length),
        ref_logps=_rows_of(job, (rows, 2), jnp.float32) if ref_logps else None,
        margin=_rows_of(job, vector, jnp.float32) if margin else None,
    )


def device_bytes(tree: PyTree) -> int:
    """Bytes on one device of arrays or shapes with shardings."""
    return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def _leaf_bytes(leaf: Any) -> int:
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size


def on_rows(job: Job, tree: PyTree) -> PyTree:
    """Shapes as they lie when their rows are spread over the mesh."""
    where = sharding.batch_sharding(job.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def _made_by(job: Job, role: str) -> Any:
    """The settings of the stage whose sampling made the pairs in a role, None where they are the data's own."""
    artifact = job.inputs.get(role)
    if artifact is None:
        return None
    settings = job.config.stages[artifact.name]
    if settings.kind == "split":
        if settings.pair_source != "dataset":
            return settings
        return job.config.stages[settings.pairs] if settings.pairs else None
    return settings


def _sampled_length(job: Job, settings: Any, replies: int) -> tuple[int, int]:
    """Row length and window of rows whose replies a stage with these settings sampled."""
    window = replies * settings.max_new_tokens
    return _up(prompt_length(job) + window, job.config.data.multiple), window


def _row_length(job: Job, window: int) -> int:
    """T of the data's own rows with so many response tokens."""
    data = job.config.data
    return min(_up(prompt_length(job) + window, data.multiple), data.max_length)


def _rows_of(job: Job, shape: tuple[int, ...], dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(job.mesh))


def _scalar(job: Job, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(job.mesh))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
