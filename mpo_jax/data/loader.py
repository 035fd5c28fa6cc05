"""Encoded rows, a batch size and a mesh enter; global device batches leave, any step's at once or all in turn.

A process builds exactly the rows that its devices address, as the sharding says; a background thread works ahead.
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import jax
import numpy as np

from mpo_jax import sharding
from mpo_jax.data import mixture
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import FILLER, Bucket, Plan, batch_plan, ordered_plan, padding_efficiency
from mpo_jax.data.rows import FIELDS, prompt_slots, tight_rows
from mpo_jax.errors import InputError
from mpo_jax.types import LEFT_OUT, Batch

FORMS = {"tight": tight_rows, "slots": prompt_slots}


class Loader:
    """The batches of a data set.

    batch_size: rows of a global batch. form: "tight" (prompt and responses) or "slots" (prompts alone, left-padded).
    mesh: rows go over its data and fsdp axes and are repeated over its tensor axis; None: one device.
    ref_logps: f32 [rows, 2], put into the batches where given; margins, where the data has any, always are.
    label: f32 [rows], put into the batches where given. bucket: int [rows], likewise.
    weight: f32 [rows], 0 or more, how much each counts; None: all 1. order: int [rows], in which training meets them,
    in every epoch alike; None: at random.
    dealt: whether a batch's rows go to the mesh's shards in turn, so that fillers and lengths are spread evenly.
    multiple: what every row length is a multiple of; max_length caps it.
    shuffle: True for training, whose batches hold real rows only; False for scoring and evaluation, which want every
    row once, in one fixed order, the last batch filled up with rows of weight 0. See `plan.batch_plan`. Rows of several
    sources are drawn by weight in training (`mixture.draw`), and met once each otherwise.

    Raises InputError if the mesh does not divide the batch.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        *,
        seed: int = 0,
        form: str = "tight",
        mesh: jax.sharding.Mesh | None = None,
        shuffle: bool = True,
        max_buckets: int = 8,
        multiple: int = 8,
        max_length: int | None = None,
        ref_logps: np.ndarray | None = None,
        label: np.ndarray | None = None,
        bucket: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        order: np.ndarray | None = None,
        dealt: bool = False,
    ):
        if form not in FORMS:
            raise InputError(f"form {form!r}: expected one of {', '.join(FORMS)}")
        if ref_logps is not None and np.shape(ref_logps) != (len(encoded), 2):
            raise InputError(f"ref_logps has shape {np.shape(ref_logps)}, expected {(len(encoded), 2)}")
        if label is not None and np.shape(label) != (len(encoded),):
            raise InputError(f"label has shape {np.shape(label)}, expected {(len(encoded),)}")
        if bucket is not None and np.shape(bucket) != (len(encoded),):
            raise InputError(f"bucket has shape {np.shape(bucket)}, expected {(len(encoded),)}")
        if weight is not None and not (np.shape(weight) == (len(encoded),) and (np.asarray(weight) >= 0).all()):
            raise InputError(f"weight has shape {np.shape(weight)}, expected {(len(encoded),)}, 0 or more each")
        if mesh is not None:
            shards = sharding.axis_size(mesh, sharding.BATCH_AXES)
            if batch_size % shards:
                raise InputError(
                    f"batch_size {batch_size} is not divided by the mesh's data x fsdp = {shards}; "
                    f"take a multiple of {shards}"
                )
        self.encoded, self.batch_size = encoded, batch_size
        self._build, self._ref_logps, self._weight, self._label = FORMS[form], ref_logps, weight, label
        self._bucket = bucket
        self._margin = None if np.isnan(encoded.margin).all() else np.nan_to_num(encoded.margin)
        self._sharding = None if mesh is None else sharding.batch_sharding(mesh)
        pieces = encoded.piece_lens
        self.lengths = pieces[:, 0] if form == "slots" else pieces.sum(axis=1)
        windows = np.zeros(len(encoded), np.int64) if form == "slots" else pieces[:, 1:].sum(axis=1)
        rows = self.lengths, windows, batch_size
        edges: dict[str, Any] = {"max_buckets": max_buckets, "multiple": multiple, "max_length": max_length}
        self._plan = functools.partial(batch_plan, *rows, seed=seed, **edges)
        self._epoch: Callable[[int], Plan] = lambda epoch: self._plan(
            epoch=epoch, shuffle=shuffle, drawn=self._drawn(epoch)
        )
        if order is not None:
            self._epoch = lambda epoch: ordered_plan(*rows, order, **edges)
        self._shuffle, self._seed = shuffle, seed
        self._shards = sharding.axis_size(mesh, sharding.BATCH_AXES) if dealt and mesh is not None else 1
        self._plans: dict[int, Plan] = {}
        self._lock = threading.Lock()
        first = self.plan(0)
        self.buckets: tuple[Bucket, ...] = first.buckets
        self.steps_per_epoch = len(first)
        self.padding_efficiency = padding_efficiency(first, self.lengths)

    def plan(self, epoch: int) -> Plan:
        """The epoch's plan; the last two are kept."""
        with self._lock:
            if epoch not in self._plans:
                self._plans = {key: plan for key, plan in self._plans.items() if key == epoch - 1}
                plan = self._epoch(epoch)
                shape, turns = plan.rows.shape, (len(plan), -1, self._shards)
                rows = plan.rows.reshape(turns).swapaxes(1, 2).reshape(shape)
                self._plans[epoch] = dataclasses.replace(plan, rows=rows)
            return self._plans[epoch]

    def _drawn(self, epoch: int) -> np.ndarray | None:
        """The epoch's rows, where they are not each row once."""
        sources = self.encoded.mixture
        return mixture.draw(sources, self._seed, epoch) if sources is not None and self._shuffle else None

    def rows(self, step: int) -> tuple[Bucket, np.ndarray]:
        """The bucket and the row indices (i32 [batch size], FILLER where none) of a step, from its number alone."""
        epoch, index = divmod(step, self.steps_per_epoch)
        plan = self.plan(epoch)
        return plan.buckets[plan.bucket[index]], plan.rows[index]

    def real_tokens(self, step: int) -> int:
        """Tokens of a step's batch that are not padding."""
        rows = self.rows(step)[1]
        return int(self.lengths[rows[rows != FILLER]].sum())

    def real_rows(self, step: int) -> int:
        """Different rows of a step's batch: all of it in training, unless the data has fewer than a batch holds."""
        rows = self.rows(step)[1]
        return len(np.unique(rows[rows != FILLER]))

    def batch(self, step: int) -> Batch:
        """The global batch of a step, on the mesh or on one device."""
        return self._batch(*self.rows(step))

    def _batch(self, bucket: Bucket, rows: np.ndarray) -> Batch:
        arrays = self._arrays(lambda part: self._host_rows(rows[part], bucket.length), bucket)
        return Batch(**arrays, window=bucket.window)

    def batches(self, start: int = 0, stop: int | None = None, ahead: int = 2) -> "Prefetch":
        """The batches of steps start, start + 1, ... before stop (None: without end), made `ahead` of their use.

        Use it in a `with`, or call `close`, when leaving before the end.
        """

        def produce() -> Iterator[Batch]:
            step = start
            while stop is None or step < stop:
                yield self.batch(step)
                step += 1

        return Prefetch(produce, ahead)

    def sample(self, batches: int, ahead: int = 2) -> "Prefetch":
        """At most so many batches of rows drawn at random from all, each once: a fair sample, the same at every call
        and for every seed, in shapes that the loader's own batches have. To be used and closed as `batches` is.
        """
        plan = self._plan(epoch=0, shuffle=False, sample=batches)

        def produce() -> Iterator[Batch]:
            for bucket, rows in zip(plan.bucket, plan.rows, strict=True):
                yield self._batch(plan.buckets[bucket], rows)

        return Prefetch(produce, ahead)

    def sampled(self, batches: int) -> int:
        """How many batches such a sample has."""
        return min(batches, -(-len(self.encoded) // self.batch_size))

    def sampled_shapes(self, batches: int) -> list[Batch]:
        """`shapes` of such a sample."""
        plan = self._plan(epoch=0, shuffle=False, sample=batches)
        return [self._abstract(self.buckets[bucket]) for bucket in np.unique(plan.bucket)]

    def shapes(self, steps: Iterable[int] | None = None) -> list[Batch]:
        """An abstract batch for every bucket that the steps meet (None: any), with its sharding: what a step is
        compiled for."""
        met = self.buckets if steps is None else dict.fromkeys(self.rows(step)[0] for step in steps)
        return [self._abstract(bucket) for bucket in met]

    def _abstract(self, bucket: Bucket) -> Batch:
        fields: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)
            for name, (shape, dtype) in self._shapes(bucket).items()
        }
        return Batch(**fields, window=bucket.window)

    def _shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], type]]:
        size = self.batch_size
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            name: ((size, bucket.length), np.int32)
            if name in ("tokens", "positions", "segments")
            else ((size,), np.int32)
            for name in FIELDS
        }
        shapes["weight"] = ((size,), np.float32)
        if self._ref_logps is not None:
            shapes["ref_logps"] = ((size, 2), np.float32)
        if self._margin is not None:
            shapes["margin"] = ((size,), np.float32)
        if self._label is not None:
            shapes["label"] = ((size,), np.float32)
        if self._bucket is not None:
            shapes["bucket"] = ((size,), np.int32)
        return shapes

    def _host_rows(self, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        arrays = self._build(self.encoded, rows, length)
        if self._weight is not None:
            arrays["weight"] = np.where(rows != FILLER, self._weight[rows], 0).astype(np.float32)
        if self._ref_logps is not None:
            known = (rows != FILLER)[:, None]
            arrays["ref_logps"] = np.where(known, self._ref_logps[rows], 0).astype(np.float32)
        if self._margin is not None:
            arrays["margin"] = np.where(rows != FILLER, self._margin[rows], 0).astype(np.float32)
        if self._label is not None:
            arrays["label"] = np.where(rows != FILLER, self._label[rows], 0).astype(np.float32)
        if self._bucket is not None:
            arrays["bucket"] = np.where(rows != FILLER, self._bucket[rows], LEFT_OUT).astype(np.int32)
        return arrays

    def _arrays(self, build: Callable[[slice], dict[str, np.ndarray]], bucket: Bucket) -> dict[str, jax.Array]:
        """Global arrays; `build` is called once for each block of rows that this process's devices address."""
        if self._sharding is None:
            return {name: jax.device_put(array) for name, array in build(slice(0, self.batch_size)).items()}
        blocks: dict[tuple[int, int], dict[str, np.ndarray]] = {}

        def block(name: str, index) -> np.ndarray:
            start, stop, _ = index[0].indices(self.batch_size)
            if (start, stop) not in blocks:
                blocks[start, stop] = build(slice(start, stop))
            return blocks[start, stop][name]

        return {
            name: jax.make_array_from_callback(shape, self._sharding, functools.partial(block, name), dtype=dtype)
            for name, (shape, dtype) in self._shapes(bucket).items()
        }


class Prefetch:
    """Runs an iterator in a background thread, at most `ahead` items before their use.

    An error in the thread is raised again by `next`. `close` (or leaving the `with`) stops the thread and waits for it.
    """

    _END = object()

    def __init__(self, produce: Callable[[], Iterator], ahead: int = 2):
        self._queue: queue.Queue = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(produce,), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, produce) -> None:
        try:
            for item in produce():
                if not self._put((item, None)):
                    return
            self._put((self._END, None))
        except BaseException as error:
            self._put((self._END, error))

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self) -> Self:
        return self

    def __next__(self):
        if self._done:
            raise StopIteration
        item, error = self._queue.get()
        if item is self._END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops the thread, waits for it, and forgets what it had made. May be called twice."""
        self._done = True
        self._stop.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
