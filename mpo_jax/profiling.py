"""Some steps of a stage enter, as `--profile=STAGE:STEP+N` names them; a device trace of them leaves in the stage's
folder, in XProf's form, with a table of the operations that took longest.

Steps are those of a training, numbered as in its metrics; of any other stage, the batches that it samples and scores.
"""

import contextlib
import csv
import dataclasses
import io
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mpo_jax import artifacts, progress
from mpo_jax.errors import InputError

TRACE = "*.xplane.pb"
OPERATIONS = "operations.csv"
_SHOWN = 10
_NAME = 50  # columns of a name in the table that is printed


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Steps `first` to `first + count - 1` of a stage, the first of all being 1."""

    stage: str
    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1


@dataclasses.dataclass(frozen=True)
class Operation:
    """name: as the compiler calls it. seconds: on all devices together, without what it calls. calls: how often."""

    name: str
    seconds: float
    calls: int


def parse(text: str, stages: Collection[str]) -> Wanted:
    """What `--profile` asks for. InputError for another form, for no step, or for a stage that will not be looked at.
    stages: those of the run."""
    found = re.fullmatch(r"(.+):(\d+)\+(\d+)", text)
    if found is None or not int(found[2]) or not int(found[3]):
        raise InputError(f"--profile: {text!r}; expected STAGE:STEP+N, as dpo:10+3 for steps 10, 11 and 12")
    if found[1] not in stages:
        raise InputError(f"--profile: no stage {found[1]!r} is to run; expected one of {', '.join(stages)}")
    return Wanted(found[1], int(found[2]), int(found[3]))


# Recording ------------------------------------------------------------------------------------------------------------


class _Recorder:
    """Records on process 0; the others know what is wanted, to fail alike. training: whether steps are a training's;
    else they are batches, counted here."""

    def __init__(self, wanted: Wanted, folder: epath.Path, training: bool):
        self.wanted, self.training = wanted, training
        self.batches = 0
        self.recorded = False
        self._writes = jax.process_index() == 0
        self._folder = folder / artifacts.PROFILE
        self._local: tempfile.TemporaryDirectory | None = None  # while it records
        self._step = contextlib.ExitStack()

    def begin(self, number: int, pending: Any) -> None:
        if number == self.wanted.first:
            jax.block_until_ready(pending)  # what was dispatched before is not these steps'
        if number == self.wanted.first and self._writes:
            self._local = tempfile.TemporaryDirectory(prefix="mpo-profile-")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would be most of the trace
            jax.profiler.start_trace(self._local.name, profiler_options=options)
        if self._local is not None:
            self._step.enter_context(jax.profiler.StepTraceAnnotation(self.wanted.stage, step_num=number))

    def end(self, number: int, result: Any) -> None:
        last = number == self.wanted.last
        if last:
            jax.block_until_ready(result)
            self.recorded = True
        self._step.close()
        if last and self._local is not None:
            opened, self._local = self._local, None
            with opened as local:
                jax.profiler.stop_trace()
                self._keep(Path(local))

    def close(self) -> None:
        """Ends what goes on, if anything does: the stage was stopped."""
        self._step.close()
        if self._local is not None:
            jax.profiler.stop_trace()
            self._local.cleanup()
            self._local = None

    def _keep(self, local: Path) -> None:
        """Copies a trace to the stage's folder, which may be remote, over one of before; writes and tells the table."""
        if self._folder.exists():
            self._folder.rmtree()
        files = sorted(path for path in local.rglob("*") if path.is_file())
        for path in files:
            artifacts.write_bytes(self._folder / path.relative_to(local), path.read_bytes())
        found = operations(path for path in files if path.match(TRACE))
        artifacts.write_text(self._folder / OPERATIONS, as_csv(found))
        wanted = self.wanted
        steps = f"{wanted.first}" if wanted.count == 1 else f"{wanted.first} to {wanted.last}"
        what = "step" if self.training else "batch"
        progress.say(f"{wanted.stage}: profile of {what} {steps} in {self._folder}\n{table(found)}")


_recorders: list[_Recorder] = []
"""That of the stage which runs, if its steps are wanted."""


@contextlib.contextmanager
def of_stage(wanted: Wanted | None, name: str, folder: epath.Path, training: bool) -> Iterator[None]:
    """While the context lasts, a stage runs, whose steps are recorded if they are those wanted."""
    if wanted is None or wanted.stage != name:
        yield
        return
    recorder = _Recorder(wanted, folder, training)
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.remove(recorder)
        recorder.close()
    if not recorder.recorded:
        raise InputError(f"--profile: {name} had {recorder.batches} batches; there was no batch {wanted.last}")


def check(start: int, steps: int) -> None:
    """InputError where the training that runs, from behind step `start` to step `steps`, has not the steps wanted."""
    for recorder in _recorders:
        wanted = recorder.wanted
        if wanted.first <= start:
            raise InputError(
                f"--profile: {wanted.stage} goes on with step {start + 1}; step {wanted.first} is already done"
            )
        if wanted.last > steps:
            raise InputError(f"--profile: {wanted.stage} has {steps} steps; there is no step {wanted.last}")


def begin(step: int, pending: Any) -> None:
    """A training's step is about to be dispatched. pending: what the device may still be busy with; it is waited for
    where recording begins."""
    for recorder in _recorders:
        if recorder.training:
            recorder.begin(step, pending)


def end(step: int, result: Any) -> None:
    """It is dispatched. result: what it gives, waited for where recording ends."""
    for recorder in _recorders:
        if recorder.training:
            recorder.end(step, result)


@contextlib.contextmanager
def batch(pending: list[Any]) -> Iterator[None]:
    """A batch of a stage that does not train is dispatched within the context. pending: what the devices may be busy
    with, to which the batch's own results are added."""
    counting = [recorder for recorder in _recorders if not recorder.training]
    for recorder in counting:
        recorder.batches += 1
        recorder.begin(recorder.batches, pending)
    yield
    for recorder in counting:
        recorder.end(recorder.batches, pending)


# The table ------------------------------------------------------------------------------------------------------------


def operations(files: Iterable[Path]) -> list[Operation]:
    """The operations of the devices in XProf traces (.xplane.pb), the longest first. An operation that calls others, as
    a loop does, has its own time alone, so that all of them add up to the time in which devices computed.

    On TPUs and GPUs the devices' own timelines are read, on a CPU the threads that ran the programs' operations."""
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for file in files:
        for events in _timelines(jax.profiler.ProfileData.from_serialized_xspace(file.read_bytes())):
            for name, own in _own_times(events):
                seconds[name] = seconds.get(name, 0.0) + own / 1e9
                calls[name] = calls.get(name, 0) + 1
    found = [Operation(name, took, calls[name]) for name, took in seconds.items()]
    return sorted(found, key=lambda each: (-each.seconds, each.name))


def table(found: Iterable[Operation], rows: int = _SHOWN) -> str:
    """The largest operations as text: total milliseconds, share of all, calls, name; 80 columns at most."""
    found = list(found)
    total = sum(each.seconds for each in found)
    if not total:
        return "  the trace holds no operation of a device"
    lines = [f"  {'ms':>10}  {'share':>6}  {'calls':>7}  operation"]
    lines += [
        f"  {1e3 * e.seconds:10,.2f}  {e.seconds / total:6.1%}  {e.calls:7,}  {e.name[:_NAME]}" for e in found[:rows]
    ]
    if rest := found[rows:]:
        took = sum(each.seconds for each in rest)
        calls = sum(each.calls for each in rest)
        lines.append(f"  {1e3 * took:10,.2f}  {took / total:6.1%}  {calls:7,}  {len(rest):,} others")
    return "\n".join(lines)


def as_csv(found: Iterable[Operation]) -> str:
    """All operations: name, total milliseconds, share of all, calls."""
    found = list(found)
    total = sum(each.seconds for each in found) or 1.0
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    writer.writerow(["operation", "total_ms", "share", "calls"])
    writer.writerows(
        [each.name, f"{1e3 * each.seconds:.6f}", f"{each.seconds / total:.6f}", each.calls] for each in found
    )
    return held.getvalue()


Event = tuple[float, float, str]
"""Start and end, in nanoseconds, and name."""


def _timelines(trace: Any) -> Iterator[list[Event]]:
    """The events of operations, timeline by timeline."""
    planes = list(trace.planes)
    devices = [plane for plane in planes if re.match(r"/device:(TPU|GPU):\d+", plane.name)]
    for plane in devices or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        lines = list(plane.lines)
        tpu = [each for each in lines if each.name == "XLA Ops"]
        streams = [each for each in lines if each.name.startswith("Stream")]
        for timeline in (tpu or streams) if devices else lines:
            events = [
                (event.start_ns, event.end_ns, event.name)
                for event in timeline.events
                if devices or any(name == "hlo_op" for name, _ in event.stats)
            ]
            if events:
                yield events


def _own_times(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """(name, nanoseconds without those of the events within it) of every event of one timeline."""
    open_: list[tuple[float, str, list[float]]] = []  # end, name, [own time]
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            _, before, own = open_.pop()
            yield before, own[0]
        if open_:
            open_[-1][2][0] -= min(end, open_[-1][0]) - start
        open_.append((end, name, [end - start]))
    for _, name, own in open_:
        yield name, own[0]
