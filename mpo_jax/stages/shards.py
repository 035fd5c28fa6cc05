"""Batches, and what is to be computed of each, enter; the results leave, those that an earlier run kept among them.

Results are written to the stage's folder every minute or so (`shard_seconds`), named by what they are of: a stage that
was killed goes on behind the last whole shard, with the same numbers. On several hosts, where every process has all
results, process 0 writes, and what it finds is told to the others, so that all go on at the same batch.
"""

import contextlib
import functools
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mpo_jax import artifacts, integrity, processes, profiling, progress, stopping
from mpo_jax.data import encode
from mpo_jax.data.loader import Loader
from mpo_jax.errors import InputError
from mpo_jax.stages import job as jobs
from mpo_jax.stages.base import Training
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import AT_WORK, Call, compile_ahead
from mpo_jax.types import Batch

FORMAT = 1
"""Raised when shards of an earlier version can't be read any more."""

Arrays = Mapping[str, np.ndarray]
"""A batch's results by name, whole on every process."""


def over(
    job: Job,
    loader: Loader,
    what: str,
    of: Sequence[Any] | None,
    call: Callable[[Batch], Call],
    read: Callable[[Any], Arrays],
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """(row indices i32 [batch size], results) of every batch of one epoch; kept ones first, the others in order.

    call: what the devices are to compute of a batch, or of its shape. read: waits for what they made of it; by then
    they have the next batch. what: the work, in a word, as "sample". of: what tells its results from others in the same
    stage's folder, beside the rows and the batches: whose weights they are by. None: nothing is kept. Raises Stopped
    behind a batch, when all that was computed is kept, if the run is to stop."""
    total = loader.steps_per_epoch
    folder = None if of is None else job.folder / artifacts.SHARDS / f"{what}-{_name(job, loader, of)}"
    done = set()
    for number, arrays in _kept(folder, total):
        done.add(number)
        yield loader.rows(number)[1], arrays
    gaps = _gaps(done, total)
    compile_ahead(job.mesh, map(call, loader.shapes(number for gap in gaps for number in range(*gap))))
    if not isinstance(job.settings, Training):  # whose steps are still to be compiled
        AT_WORK.set()
    for start, stop in gaps:
        with _Writer(folder, job.config.shard_seconds) as shard, loader.batches(start, stop) as stream:
            computed = _one_ahead(stream, call, read)
            for number, arrays in enumerate(progress.each(computed, what, total, done=len(done)), start):
                shard.add(number, arrays)
                done.add(number)
                yield loader.rows(number)[1], arrays
                if len(done) < total:
                    stopping.obey(f"{what}: batch {len(done)} of {total}")
    stopping.obey(what)


def _one_ahead(batches: Iterable[Batch], call: Callable[[Batch], Call], read: Callable[[Any], Arrays]):
    """The results of batches in order; the devices have each before the host reads the one before it."""
    pending: list[Any] = []
    for batch in batches:
        try:
            with profiling.batch(pending):
                function, arguments = call(batch)
                pending.append(function(*arguments))
        except Exception:
            if pending:  # the batch before is computed, and will not be again
                yield read(pending.pop())
            raise
        if len(pending) > 1:
            yield read(pending.pop(0))
    if pending:
        yield read(pending.pop())


def loaded(weights: Any) -> Callable[[], Any]:
    """Gives the weights: a tree, or what a function loads when they are first asked for."""
    return functools.cache(weights) if callable(weights) else lambda: weights


def _name(job: Job, loader: Loader, of: Sequence[Any]) -> str:
    """A stage's folder belongs to one set of its settings, its inputs and their makings, but not to how it computes:
    the batches, the types of numbers."""
    plan = loader.plan(0)
    batches = hashlib.blake2b(np.ascontiguousarray(plan.rows).tobytes(), digest_size=16)
    batches.update(repr((loader.buckets, plan.rows.shape)).encode() + np.ascontiguousarray(plan.bucket).tobytes())
    parts = [FORMAT, list(of), job.seed, jobs.model(job).dtype, jobs.frozen_dtype(job)]
    return integrity.hash_settings([*parts, encode.rows_fingerprint(loader.encoded), batches.hexdigest()])[:16]


def _gaps(done: set[int], total: int) -> list[tuple[int, int]]:
    """The ranges of batches, [start, stop), that are not done."""
    missing = [number for number in range(total) if number not in done]
    starts = [number for number in missing if number == 0 or number - 1 in done]
    stops = [number + 1 for number in missing if number + 1 == total or number + 1 in done]
    return list(zip(starts, stops, strict=True))


def _kept(folder: epath.Path | None, total: int) -> Iterator[tuple[int, Arrays]]:
    """The batches that an earlier run kept, on every process; a damaged shard is told, and left out."""
    if folder is None:
        return
    listed = processes.told_by_first(lambda: json.dumps(_listed(folder)).encode())
    for name in json.loads(listed):
        content = processes.told_by_first(lambda name=name: (folder / name).read_bytes())  # type: ignore[misc]
        for number, arrays in _batches(content).items():
            if number < total:
                yield number, arrays


def _listed(folder: epath.Path) -> list[str]:
    """The names of whole shards in a folder."""
    found = []
    for path in sorted(folder.glob("*.npz")) if folder.exists() else []:
        try:
            if sorted(_batches(path.read_bytes())) != _numbers(path.name):
                raise ValueError("it holds other batches than its name says")
            found.append(path.name)
        except artifacts.DAMAGED as error:
            print(f"shards: {path}: damaged ({error}); it is made again", file=sys.stderr, flush=True)
    return found


def _numbers(name: str) -> list[int]:
    """The batches of a shard, by its name, FIRST-LAST.npz."""
    first, last = name.removesuffix(".npz").split("-")
    return list(range(int(first), int(last) + 1))


def _batches(content: bytes) -> dict[int, dict[str, np.ndarray]]:
    """Batch number -> its results, of a shard's bytes. Its checksums are checked."""
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays.files:
            name, number = key.rsplit(".", 1)
            found.setdefault(int(number), {})[name] = arrays[key]
    return found


class _Writer:
    """Writes results of consecutive batches to a folder, each so many seconds, and what is left at the end, whatever
    ends the work. None: nowhere."""

    def __init__(self, folder: epath.Path | None, seconds: float):
        self._folder = folder if jobs.is_first() else None
        self._seconds = seconds
        self._waiting: dict[int, Arrays] = {}
        self._since = time.monotonic()

    def add(self, number: int, arrays: Arrays) -> None:
        if self._folder is None:
            return
        self._waiting[number] = arrays
        if time.monotonic() - self._since >= self._seconds:
            self._write()

    def _write(self) -> None:
        if self._folder is not None and self._waiting:
            name = f"{min(self._waiting):08d}-{max(self._waiting):08d}.npz"
            flat = {f"{key}.{number}": array for number, each in self._waiting.items() for key, array in each.items()}
            artifacts.write_arrays(self._folder / name, flat)
        self._waiting = {}
        self._since = time.monotonic()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        # An error of the work is not hidden by one of writing.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError, InputError):
            self._write()
