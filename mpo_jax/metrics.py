"""Device scalars enter, a step at a time; `metrics.jsonl`, TensorBoard events and what progress shows leave.

A step's scalars are read when the next step's are handed over, so that the loop never waits for the device. Only
process 0 writes.
"""

import contextlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from mpo_jax import artifacts, progress, trackers
from mpo_jax.artifacts import METRICS
from mpo_jax.lines import split_lines
from mpo_jax.store import is_remote

_LOWERED_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # what comes next is its compile
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_REMOTE_SECONDS = 60  # an object store can't append: there the whole file is written again, this often
_NOT_FINITE = {text: float(text) for text in ("nan", "inf", "-inf")}
_compiled = [0]


class MetricsWriter:
    """Writes the metrics of one stage into its folder.

    start: the step that the run resumes from: lines and events of later steps, left by a killed run, are cut away.
    total: steps of the whole run, whose progress is shown (None: it is not). wandb: where at Weights & Biases it is
    logged too; InputError where that is not installed. As a context manager, it closes also when the loop fails.
    """

    def __init__(
        self, folder: epath.PathLike, start: int = 0, total: int | None = None, wandb: trackers.Account | None = None
    ):
        self._folder = epath.Path(folder)
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self.last: tuple[int, dict[str, float]] | None = None
        self._lines: _Lines | None = None
        self._events: _Events | None = None
        self._wandb = None
        self._clock: tuple[int, float] | None = None
        self._work: progress.Work | None = None
        self._stack = contextlib.ExitStack()
        if jax.process_index() != 0:
            return
        self._wandb = None if wandb is None else trackers.start_wandb(self._folder, wandb)
        self._folder.mkdir(parents=True, exist_ok=True)
        cut_to(self._folder, start)
        self._lines = _Lines(self._folder / METRICS)
        if not is_remote(self._folder):
            self._events = _Events(self._folder / artifacts.EVENTS, start, trackers.known(self._folder))
        if total:
            self._work = self._stack.enter_context(progress.work("train", total, start))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands over a step's scalars; those handed over before are read and written now."""
        before, self._waiting = self._waiting, (step, dict(values))
        if before is not None:
            self._put(*before)

    def write_now(self, step: int, values: Mapping[str, Any]) -> None:
        """Reads and writes at once, after all handed over before: for evaluations, which have waited anyway."""
        self.flush()
        self._put(step, values, is_step=False)

    def flush(self) -> None:
        """Reads and writes what is still waiting; the lines are on disk when this returns."""
        before, self._waiting = self._waiting, None
        if before is not None:
            self._put(*before)
        if self._lines is not None:
            self._lines.sync()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Writes the last step and closes; a second call does nothing."""
        try:
            self.flush()
        finally:
            self._close_all()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            return self.close()
        # The loop failed: the step that waits may explain it, unless its values are what can't be read.
        with contextlib.suppress(RuntimeError, ValueError):
            self.flush()
        return self._close_all()

    def _close_all(self) -> None:
        lines, self._lines = self._lines, None
        if lines is None:
            return
        events, self._events = self._events, None
        with self._stack as stack:  # each is closed, whatever another meets
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
            if events is not None:
                stack.callback(events.close)
            stack.callback(lines.close)

    def _put(self, step: int, values: Mapping[str, Any], is_step: bool = True) -> None:
        read = jax.device_get(dict(values))  # all at once; it sorts the names
        found = {name: float(read[name]) for name in values}
        if is_step:
            self.last = step, found
        if self._lines is None:
            return
        # JSON has no NaN: a value that is not finite is written as text, which `read` turns back.
        shown = {name: value if math.isfinite(value) else str(value) for name, value in found.items()}
        self._lines.append(json.dumps({"step": step} | shown))
        if self._events is not None:
            self._events.append(step, found)
        if self._wandb is not None:
            self._wandb.log(found, step=step)
        if is_step:
            self._progress(step, found)
        else:
            self._clock = None  # an evaluation's time is not the steps'

    def _progress(self, step: int, found: dict[str, float]) -> None:
        names: tuple[str, ...] = ("loss", "accuracy", "score", "kl", "padding_efficiency")
        shown = {name: f"{found[name]:.4f}" for name in names if name in found}
        before, self._clock = self._clock, (step, time.perf_counter())
        if "tokens_per_second" in found:
            shown["tokens/s"] = f"{found['tokens_per_second']:,.0f}"
        elif before is not None and "tokens" in found:
            steps, seconds = step - before[0], max(self._clock[1] - before[1], 1e-9)
            shown["tokens/s"] = f"{found['tokens'] * steps / seconds:,.0f}"
        if self._work is not None:
            self._work.n, self._work.notes = step, shown


class _Lines:
    """Appends lines to a file, each by one write, so that a kill can tear the last alone."""

    def __init__(self, path: epath.Path):
        remote = is_remote(path)
        self._path, self._written = path, time.monotonic()
        self._text = path.read_text() if remote and path.exists() else ""
        self._file = None if remote else open(path, "ab", buffering=0)  # noqa: SIM115, closed by `close`

    def append(self, line: str) -> None:
        if self._file is not None:
            self._file.write(f"{line}\n".encode())
            return
        self._text += f"{line}\n"
        if time.monotonic() - self._written > _REMOTE_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            return
        self._path.write_text(self._text)
        self._written = time.monotonic()

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()


class _Events:
    """TensorBoard's events, written where they are handed over: the library's own writer does that in a thread, which a
    full disk ends, and then waits for it for ever."""

    def __init__(self, folder: epath.Path, start: int, settings: Mapping[str, Any]):
        # Here, since importing it takes a second, which a start that trains nothing need not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # A file is named by its second: without a suffix, a quick restart would write over the file before.
        self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        # Readers drop the events at and after this step that stand in older files.
        self._write(step=start + 1, file_version="brain.Event:2")
        self._write(step=start + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._end: Any = None
        if settings:
            *begin, self._end = trackers.hparams(settings)
            for record in begin:
                self._write(step=start, summary=record)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            scalar = self._summary.Value(tag=name, simple_value=value)
            self._write(step=step, summary=self._summary(value=[scalar]))

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._end is not None:
            self._write(summary=self._end)
        self._writer.close()


def cut_to(folder: epath.PathLike, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line that a kill left incomplete; whole or not at all."""
    path = epath.Path(folder) / METRICS
    if not path.exists():
        return
    _replace(path, _lines_to(path, step))


def put(folder: epath.PathLike, name: str, step: int, row: Mapping[str, Any]) -> None:
    """Adds a step's row to a small JSONL file, in place of what a killed run left of this step and later ones."""
    path = epath.Path(folder) / name
    kept = _lines_to(path, step - 1) if path.exists() else []
    _replace(path, [*kept, json.dumps({"step": step} | dict(row))])


def _lines_to(path: epath.Path, step: int) -> list[str]:
    return [line for line in split_lines(path.read_text()) if (row := _parse(line)) and row["step"] <= step]


def _replace(path: epath.Path, lines: list[str]) -> None:
    artifacts.write_text(path, "".join(line + "\n" for line in lines))


def read(folder: epath.PathLike) -> list[dict[str, float]]:
    """All complete lines of a stage's metrics, in order; none where there is no file."""
    path = epath.Path(folder) / METRICS
    lines = split_lines(path.read_text()) if path.exists() else []
    return [row for line in lines if (row := _parse(line)) is not None]


def curve(folder: epath.PathLike, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a stage, wherever it was written."""
    return points(read(folder), name)


def points(rows: Iterable[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in rows of a stage's metrics, wherever it was written."""
    return [(int(row["step"]), float(row[name])) for row in rows if name in row]


def compiles() -> int:
    """How many programs this process compiled since the first call; a step that adds to it after warm-up is a bug."""
    if not _compiled[1:]:
        _compiled.append(1)
        jax.monitoring.register_event_duration_secs_listener(_count)
    return _compiled[0]


def _count(event: str, duration_secs: float, **about) -> None:
    if progress.is_aside():
        return
    if event == _LOWERED_EVENT:
        progress.compiling(re.sub(r"^jit\((.*)\)$", r"\1", str(about.get("fun_name", "a program"))))
    elif event == _COMPILE_EVENT:
        _compiled[0] += 1
        progress.compiled()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "step" not in row:
        return None
    return {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
