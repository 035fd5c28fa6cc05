"""A stage's settings and a mesh enter; the programs that it compiles leave, with the shapes they are called with.

Each kind of stage lists its own programs; here is what they have in common. The arguments are shapes of the largest
bucket: rows of data.max_length tokens, prompts of what a reply leaves of it. Letters as in `types`.
"""

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax import sharding
from mpo_jax.models.config import ModelConfig
from mpo_jax.sampling import SamplingConfig, trips
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from mpo_jax.types import Batch, PyTree, TrainState

STEPS = 1000
"""Optimizer steps of a training whose data has not been read: only its learning rates depend on them."""

AT_WORK = threading.Event()
"""Set when a stage has compiled the first of what it calls, a training all of its steps, so that the processors have
time for other things; whoever runs the stages clears it before each."""

_THREADS = 8
"""Programs that are compiled at a time, at most: each takes memory of the host."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a program computes at a time, for arithmetic. kind: train | forward | decode. rows, length, window: of a
    microbatch, over all devices (decode: prompts of `length`, `window` response slots). steps: of a decode loop.
    trained: bytes on one device of what gets gradients; trunks: models that run, and whose activations are kept for
    gradients. adds: whether gradients lie beside the state. repeats: microbatches of one call. batches: of a stage,
    that one call replies to, `rows` at a time. loops: iterations of loops whose end the data decides: of each innermost
    one, and of those around them."""

    model: ModelConfig
    kind: str
    rows: int
    length: int
    window: int
    steps: int = 0
    trained: int = 0
    trunks: int = 1
    adds: bool = False
    repeats: int = 1
    batches: int = 1
    loops: tuple[int, int] = (1, 1)

    def at(self, rows: int, remat: str) -> "Extent":
        """The same training step, so many rows computed at a time, under another remat."""
        all_rows = self.rows * self.repeats
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, remat=remat),
            rows=rows,
            repeats=all_rows // rows,
        )

    def resized(self, length: int, window: int, steps: int) -> "Extent":
        """The same call for rows of other lengths."""
        return dataclasses.replace(self, length=length, window=window, steps=steps)

    @property
    def accumulates(self) -> bool:
        """Whether a sum of gradients lies beside those of the rows at work."""
        return self.adds or self.repeats > 1


@dataclasses.dataclass(frozen=True)
class Program:
    """function: jitted; the stage calls this very object. arguments: ShapeDtypeStructs with shardings. held: what else
    lies in memory while it runs. per: how often the stage runs it, for each "step" of training, "batch" of its rows, or
    "evaluation"."""

    function: Any
    arguments: tuple
    extent: Extent
    held: PyTree = ()
    per: str = "step"


Programs = dict[str, Program]

Call = tuple[Any, tuple]
"""A jitted function, and its arguments or their shapes with shardings."""


def named(function: Any, name: str) -> Any:
    """The function under a name, by which compilers, profiles and logs call its program."""
    function.__name__ = function.__qualname__ = name
    return function


def made_once(make: Callable[..., Programs]) -> Callable[..., Programs]:
    """Of a kind's `programs`: makes those of a job once, so that what was compiled of them is found again."""

    @functools.wraps(make)
    def programs(job: Job, *given: Any) -> Programs:
        key = make, given
        if key not in job.made:
            job.made[key] = make(job, *given)
        return job.made[key]

    return programs


def compile_ahead(mesh: jax.sharding.Mesh, calls: Iterable[Call]) -> None:
    """Compiles programs side by side, in threads, each once. A call with arguments of the same shapes, types and
    shardings then compiles nothing.

    For a GPU one after the other: while it compiles, XLA times kernels on the card, and would time others' too."""
    alone = mesh.devices.flat[0].platform == "gpu"
    with ThreadPoolExecutor(1 if alone else min(_THREADS, processors()), "compile") as threads:
        for done in [threads.submit(compile_call, mesh, call) for call in different(calls)]:
            done.result()


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_call(mesh: jax.sharding.Mesh, call: Call) -> None:
    """Compiles what a call runs."""
    function, arguments = call
    with jax.set_mesh(mesh):  # each thread has its own
        function.lower(*arguments).compile()


def different(calls: Iterable[Call]) -> list[Call]:
    """One call of each program."""
    return list({(function, _shapes_of(arguments)): (function, arguments) for function, arguments in calls}.values())


def _shapes_of(arguments: tuple) -> tuple:
    """What tells the programs of one function apart."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


# Extents --------------------------------------------------------------------------------------------------------------


def train(
    job: Job, model: ModelConfig, state: TrainState, rows: Batch, update: int, repeats: int = 1, adds: bool = False
) -> Extent:
    """Of updates of `update` rows each, `repeats` in one call. adds: whether gradients lie beside the state."""
    part = job.settings.microbatch or update
    return Extent(
        model,
        "train",
        part,
        rows.tokens.shape[1],
        rows.window,
        trained=device_bytes(state.params),
        trunks=2 if "value" in state.params and "head" not in state.params else 1,
        adds=adds,
        repeats=update // part * repeats,
    )


def forward(model: ModelConfig, rows: Batch, trunks: int = 1) -> Extent:
    size, length = rows.tokens.shape
    return Extent(model, "forward", size, length, rows.window, trunks=trunks)


def decode(model: ModelConfig, how: SamplingConfig, prompts: Batch, batches: int = 1) -> Extent:
    """Of a call that replies to all prompts, so many batches, one batch's number at a time."""
    steps, (size, length) = how.max_new_tokens, prompts.tokens.shape
    rows, (on_device, _) = size // batches, prompts.tokens.sharding.shard_shape((size, length))
    found = trips(steps, on_device // batches, batches)
    return Extent(model, "decode", rows, length, how.n * steps, steps=steps, batches=batches, loops=found)


# Shapes ---------------------------------------------------------------------------------------------------------------


def frozen_weights(job: Job, model: ModelConfig, head: bool = False) -> PyTree:
    return jobs.abstract_weights(model, job.mesh, head=head, dtype=jobs.frozen_dtype(job))


def prompt_length(job: Job) -> int:
    """P: the longest prompt, or what one reply leaves of a row."""
    return _up(jobs.prompt_limit(job), job.config.data.multiple)


def pairs(
    job: Job, rows: int, made_by: Any, ref_logps: bool = False, margin: bool = False, label: bool = False,
    bucket: bool = False,
) -> Batch:  # fmt: skip
    """Rows of a prompt and two replies: from the data, or as long as the stage `made_by` samples them."""
    data = job.config.data
    if made_by is None:
        window = 2 * data.max_response
        return batch(job, rows, row_length(job, window), window, ref_logps, margin, label, bucket)
    return batch(job, rows, *sampled_length(job, made_by, 2), ref_logps, margin, label, bucket)


def replies(job: Job, rows: int, made_by: Any) -> Batch:
    """Rows of a prompt and one reply, see `pairs`."""
    window = job.config.data.max_response
    if made_by is None:
        return batch(job, rows, row_length(job, window), window)
    return batch(job, rows, *sampled_length(job, made_by, 1))


def batch(
    job: Job,
    rows: int,
    length: int,
    window: int,
    ref_logps: bool = False,
    margin: bool = False,
    label: bool = False,
    bucket: bool = False,
) -> Batch:
    """An abstract batch of the loader's form."""
    sharding.check_batch(rows, job.mesh)
    columns, vector = (rows, length), (rows,)
    return Batch(
        tokens=rows_of(job, columns, jnp.int32),
        positions=rows_of(job, columns, jnp.int32),
        segments=rows_of(job, columns, jnp.int32),
        id=rows_of(job, vector, jnp.int32),
        prompt_id=rows_of(job, vector, jnp.int32),
        weight=rows_of(job, vector, jnp.float32),
        window=min(_up(window, job.config.data.multiple), length),
        ref_logps=rows_of(job, (rows, 2), jnp.float32) if ref_logps else None,
        margin=rows_of(job, vector, jnp.float32) if margin else None,
        label=rows_of(job, vector, jnp.float32) if label else None,
        bucket=rows_of(job, vector, jnp.int32) if bucket else None,
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


def made_by_stage(job: Job, role: str) -> Any:
    """The settings of the stage whose sampling made the pairs in a role, None where they are the data's own."""
    artifact = job.inputs.get(role)
    if artifact is None:
        return None
    settings = job.config.stages[artifact.name]
    while not getattr(settings, "samples_pairs", False):
        if getattr(settings, "pairs", "") not in job.config.stages:
            return None
        settings = job.config.stages[settings.pairs]
    return settings


def sampled_length(job: Job, settings: Any, replies: int) -> tuple[int, int]:
    """Row length and window of rows whose replies a stage with these settings sampled."""
    window = replies * settings.max_new_tokens
    return _up(prompt_length(job) + window, job.config.data.multiple), window


def row_length(job: Job, window: int) -> int:
    """T of the data's own rows with so many response tokens."""
    data = job.config.data
    return min(_up(prompt_length(job) + window, data.multiple), data.max_length)


def rows_of(job: Job, shape: tuple[int, ...], dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(job.mesh))


def scalar(job: Job, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(job.mesh))


def number(job: Job, value: int) -> jax.Array:
    """An i32 of `scalar`'s shape and sharding: a program takes a Python integer for another type, and is compiled
    again."""
    return jax.device_put(np.int32(value), sharding.replicated(job.mesh))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
