"""Takes a loss, an optimizer, a loader and a starting state; gives trained parameters and the run's summary.

The only training loop: SFT, reward model and DPO differ in their loss alone. Killed at any instant, the next run
continues from the last checkpoint and ends with the same numbers.
"""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from mpo_jax import artifacts, optim, profiling, progress, stopping, trackers
from mpo_jax import metrics as metrics_log
from mpo_jax.data.account import epochs
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.evaluation import signatures
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import gradients, nonfinite
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import PolicyTraining, Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import AT_WORK, Call, Program, Programs, compile_ahead, named
from mpo_jax.stages.stopwatch import Reading, Stopwatch
from mpo_jax.types import Batch, PyTree, TrainState

Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Any]]]
"""(state, frozen, batch) -> (state, metrics); the state is donated."""

Evaluate = Callable[[PyTree, PyTree, int], dict[str, float]]
"""(params, frozen, steps done) -> metrics on held-out data."""


@dataclasses.dataclass(frozen=True)
class Extra:
    """What a training's state holds beside parameters and optimizer, and what the loss finds in `frozen`.

    arrays: shapes with shardings, by name. update: (extra, new params, steps done) -> extra."""

    arrays: dict[str, PyTree]
    update: Callable[[PyTree, PyTree, jax.Array], PyTree]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What tells one training stage from another, and how long it runs.

    params: the trainable weights, on the mesh; `train` copies them and frees the caller's. frozen: all other arrays
    that the step reads. extra: see `types.TrainState`. best: the evaluation's metric whose minimum (or, with a leading
    "-", maximum) marks the best checkpoint. settings: the stage's own. name, known: the stage's name and what is known
    of its summary, for the failures that evaluations show. watch: is told each logged step's number and values, to warn
    of what needn't stop the run. policy: what a snapshot holds of the parameters. calls: (step) -> what the steps from
    there on call, and their evaluations; it is compiled before the first.
    """

    step: Step
    optimizer: optax.GradientTransformation
    rate: Callable
    params: PyTree
    frozen: PyTree
    loader: Loader
    evaluate: Evaluate | None
    settings: Training
    key: jax.Array
    extra: PyTree = dataclasses.field(default_factory=dict)
    best: str = "loss"
    name: str = ""
    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    watch: Callable[[int, dict[str, float]], None] | None = None
    policy: Callable[[PyTree], PyTree] = lambda params: params
    calls: Callable[[int], Iterable[Call]] = lambda first: ()


def programs(
    job: Job[Training],
    model: ModelConfig,
    loss: gradients.Loss,
    params: PyTree,
    rows: Batch,
    steps: int = shapes.STEPS,
    extra: Extra | None = None,
    judged: tuple[gradients.Loss, Batch] | None = None,
) -> Programs:
    """The step, and the evaluation, of a training that minimises `loss` over batches like `rows`.

    params: shapes with shardings of what is trained. steps: of the whole training. judged: the loss of the evaluation,
    and its batches; None: the same.
    """
    frozen = {"base": jobs.abstract_base(job, model)}
    optimizer, _ = optim.of_settings(job.settings, steps)
    state = gradients.abstract_state(optimizer, params, job.mesh, extra.arrays if extra else None)
    skip = job.settings.on_nonfinite == "skip"
    follow = extra.update if extra else None
    step = gradients.jit_step(
        named(gradients.train_step(loss, optimizer, microbatches(job), skip, follow), "train"), state, job.mesh
    )
    extent = shapes.train(job, model, state, rows, job.settings.batch_size)
    judge, judged_rows = judged or (loss, rows)
    forward = shapes.forward(model, judged_rows)
    return {
        "train": Program(step, (state, frozen, rows), extent),
        "evaluate": Program(
            gradients.evaluation_step(judge),
            (state.params, frozen, judged_rows),
            forward,
            (state, frozen),
            per="evaluation",
        ),
    }


def supervised(
    job: Job[Training],
    compiled: Programs,
    params: PyTree,
    frozen: PyTree,
    loader: Loader,
    heldout: Loader,
    steps: int,
    extra: PyTree | None = None,
) -> Trainer:
    """Such a training, over a loader's batches and judged on `heldout`. compiled: its `programs` for as many steps.
    extra: the arrays of its `Extra`."""
    optimizer, rate = optim.of_settings(job.settings, steps)

    def judged(params, frozen, _):
        return evaluate(compiled["evaluate"].function, params, frozen, heldout, job.settings.eval_batches)

    return Trainer(
        step=compiled["train"].function,
        optimizer=optimizer,
        rate=rate,
        params=params,
        frozen=frozen,
        loader=loader,
        evaluate=judged,
        settings=job.settings,
        key=jobs.key(job),
        extra=extra or {},
        name=job.name,
        calls=functools.partial(calls, job, compiled, loader, heldout),
    )


def calls(job: Job[Training], compiled: Programs, loader: Loader, heldout: Loader, first: int = 0) -> Iterator[Call]:
    """What such a training calls from a step on, and in its evaluations."""
    step, judge = compiled["train"], compiled["evaluate"]
    state, frozen, _ = step.arguments
    for rows in loader.shapes(to_compile(job, loader, first)):
        yield step.function, (state, frozen, rows)
    for rows in heldout.sampled_shapes(job.settings.eval_batches):
        yield judge.function, (state.params, frozen, rows)


def to_compile(job: Job[Training], loader: Loader, first: int) -> range:
    """Steps of a training, from one on, that meet all of its shapes: no epoch has other buckets than the one before
    it."""
    return range(first, min(total_steps(job, loader), first + loader.steps_per_epoch))


def check(job: Job[Training]) -> None:
    """InputError where the mesh does not divide what is computed at a time, and where wandb is asked for and missing;
    nothing is loaded."""
    if job.settings.wandb and importlib.util.find_spec("wandb") is None:
        raise job.error("wandb", "true, but wandb is not installed; pip install wandb, or set it to false")
    jobs.check_batch(job, job.settings.batch_size)
    if job.settings.microbatch:
        jobs.check_batch(job, job.settings.microbatch, "microbatch")


def microbatches(job: Job[Training]) -> int:
    """How many parts an update's rows are computed in."""
    return job.settings.update_rows // (job.settings.microbatch or job.settings.update_rows)


def steps_on(job: Job[Training], encoded: Encoded) -> int:
    """`total_steps` on rows that a training reads as long as they are."""
    return total_steps(job, jobs.loader(job, encoded, job.settings.batch_size, max_length=None))


def total_steps(job: Job[Training], loader: Loader) -> int:
    """Optimizer steps of a run: `steps`, or what `epochs` gives."""
    steps = job.settings.steps or round(job.settings.epochs * loader.steps_per_epoch)
    if steps < 1:
        raise job.error("epochs", f"{job.settings.epochs}; no step to take; give steps or more epochs")
    return steps


def evaluate(step: Callable, params: PyTree, frozen: PyTree, loader: Loader, batches: int) -> dict[str, float]:
    """Means of the loss and its metrics over a fair sample of a loader's rows, of `batches` batches at most.

    step: a `gradients.evaluation_step`, compiled once for a run.
    """
    sums: gradients.Metrics = {}
    with loader.sample(batches) as stream:
        for batch in progress.each(stream, "evaluate", loader.sampled(batches)):
            new = step(params, frozen, batch)
            sums = new if not sums else jax.tree.map(jnp.add, sums, new)
    return {name: float(total) / max(float(weight), 1e-8) for name, (total, weight) in sums.items()}


def _tracked(settings: Training) -> trackers.Account | None:
    return trackers.Account(settings.wandb_project, settings.wandb_entity) if settings.wandb else None


def _release(params: PyTree, frozen: PyTree) -> None:
    """Frees arrays that the state holds a copy of, unless something frozen is made of the same ones."""
    kept = {id(leaf) for leaf in jax.tree.leaves(frozen)}
    for leaf in jax.tree.leaves(params):
        if id(leaf) not in kept and not leaf.is_deleted():
            leaf.delete()


def train(training: Trainer, steps: int, folder: epath.Path, mesh) -> tuple[PyTree, dict[str, Any]]:
    """Trains for `steps` steps in all, from the last checkpoint in `folder` if there is one.

    Returns the parameters and a summary: steps, those skipped, final and best evaluation, padding efficiency, compiles
    after warm-up. Raises Stopped, having saved, after the step in which the run was told to stop. Raises NonFinite;
    such a step is never saved.
    """
    from mpo_jax import checkpoint  # not at the top: a command's start that trains nothing needs no Orbax

    settings, loader = training.settings, training.loader
    checkpoints = checkpoint.Checkpoints(folder / artifacts.CHECKPOINTS, keep=settings.keep)
    progress: dict[str, Any] = {"best": None, "best_step": None, "evaluation": {}}
    if (latest := checkpoints.latest_step()) is None:
        state = gradients.init_state(training.optimizer, training.params, training.key, mesh, training.extra)
    else:
        abstract = gradients.abstract_state(training.optimizer, training.params, mesh, training.extra)
        state, progress = checkpoints.restore(latest, abstract)
    arrays = [leaf for leaf in jax.tree.leaves(training.extra) if isinstance(leaf, jax.Array)]
    _release((training.params, arrays), training.frozen)
    start = int(state.step)
    profiling.check(start, steps)
    checkpoints.check_room(state)  # not first told where hours are to be saved
    jobs.say(epochs(steps, loader.batch_size, len(loader.encoded)))
    kept = settings.snapshot_steps(steps) if isinstance(settings, PolicyTraining) else []
    eval_every = settings.eval_every or max(1, steps // 10)
    save_every = settings.save_every or max(1, steps // 10)
    before = metrics_log.compiles()
    if start < steps:
        compile_ahead(mesh, training.calls(start))
    AT_WORK.set()
    compiles = {"first": metrics_log.compiles() - before, "late": 0}
    watch = nonfinite.Watch(loader, settings.on_nonfinite == "skip", progress.get("skipped", 0))
    # Whatever ends the loop, saves that have begun are waited for.
    with (
        checkpoints,
        metrics_log.MetricsWriter(folder, start, steps, wandb=_tracked(settings)) as log,
        stopping.held(),
    ):
        seen: set[Any] = set()
        clock, laps = Stopwatch(), list[Reading]()
        told_signs: set[str] = set()
        for step, batch in _numbered(loader, start, steps):
            bucket = jax.tree.structure(batch), batch.tokens.shape
            before, done = metrics_log.compiles(), step + 1
            profiling.begin(done, state)
            clock.begin()
            state, out = training.step(state, training.frozen, batch)
            lap = clock.lap(out["loss"])
            profiling.end(done, out)
            if new := metrics_log.compiles() - before:
                compiles["late" if bucket in seen else "first"] += new
            else:
                laps.append(lap)
            seen.add(bucket)
            watch.look(done, out)
            checkpoints.check()
            if done % settings.log_every == 0 or done == steps:
                out |= {
                    "learning_rate": float(training.rate(step)),
                    "rows": loader.real_rows(step),
                    "tokens": loader.real_tokens(step),
                    "padding_efficiency": loader.real_tokens(step) / batch.tokens.size,
                }
                if laps:  # a step that compiles has no time of its own
                    out["seconds"], laps = clock.mean(laps), []
                log.write(done, out)
                watch.check(checkpoints.latest_step(), behind=True)
                if training.watch is not None and log.last is not None:
                    training.watch(*log.last)
            if training.evaluate is not None and (done % eval_every == 0 or done == steps):
                watch.check(checkpoints.latest_step())
                evaluation = training.evaluate(state.params, training.frozen, done)
                log.write_now(done, {f"eval/{name}": value for name, value in evaluation.items()})
                for sign in signatures.appeared(training.name, folder, training.known, told_signs):
                    jobs.say(f"warning: {sign}")
                progress["evaluation"] = evaluation
                if _better(evaluation, progress["best"], training.best):
                    progress |= {"best": evaluation, "best_step": done}
                    checkpoints.save_best(done, state.params)
            if done in kept:  # before the state of the same step: a stage that resumes behind it has it
                watch.check(checkpoints.latest_step())
                checkpoint.save_weights(folder / artifacts.SNAPSHOTS / str(done), training.policy(state.params))
            told = stopping.reached()
            if done % save_every == 0 or done == steps or told:
                log.flush()
                watch.check(checkpoints.latest_step())
                progress["skipped"] = watch.skipped
                checkpoints.save(done, state, progress)
            if told and done < steps:
                stopping.stop(f"step {done} of {steps}")
    params = state.params
    if settings.select == "best" and progress["best_step"] is not None:
        params = _best_params(folder, progress["best_step"], params)
    summary = {
        "steps": steps,
        "epochs": steps * loader.batch_size / len(loader.encoded),
        "skipped": progress.get("skipped", 0),
        "evaluation": progress["evaluation"],
        "best": progress["best"],
        "best_step": progress["best_step"],
        "padding_efficiency": loader.padding_efficiency,
        "buckets": len(loader.buckets),
        "compiles": compiles["first"],
        "compiles_after_warmup": compiles["late"],
    } | ({"snapshots": kept} if kept else {})
    jobs.say(
        f"{steps} steps; padding efficiency {loader.padding_efficiency:.3f} in {len(loader.buckets)} buckets; "
        f"{compiles['late']} compiles after warm-up"
    )
    return params, summary


def _best_params(folder: epath.Path, step: int, like: PyTree) -> PyTree:
    from mpo_jax import checkpoint

    with checkpoint.Checkpoints(folder / artifacts.CHECKPOINTS) as checkpoints:
        return checkpoints.restore_best(step, like)


def _numbered(loader: Loader, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    with loader.batches(start, stop) as stream:
        yield from zip(range(start, stop), stream, strict=True)


def _better(evaluation: dict[str, float], best: dict[str, float] | None, name: str) -> bool:
    sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
    value = sign * evaluation[name]
    return math.isfinite(value) and (best is None or value < sign * best[name])
