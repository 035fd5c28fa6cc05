"""Stages enter; each is ended by every kind of signal at several moments and run again; a table leaves, a line each:
how it ended, how much work was lost, and whether what it left is bit for bit that of a run that nothing disturbed.

    python -m tests.tools.matrix --model=FOLDER --out=FOLDER [--stages=sft,pairs] [--signals=SIGKILL] [--moments=middle]

The package is imported once and every run is a fork of that process. --processes=2 runs each as on two hosts, of which
the second is sent the signals. What OUT/matrix.jsonl has already is not run again.
"""

import argparse
import atexit
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax

from mpo_jax import allocator, main, metrics, mpo, pipeline  # noqa: F401 - loaded before the forks
from mpo_jax.artifacts import CHECKPOINTS, INPUTS, MANIFEST, SHARDS, read_manifest
from tests.tools import kills, processes, small_graph

KINDS = {
    "SIGKILL": ((signal.SIGKILL,), slice(None), -signal.SIGKILL),
    "SIGTERM": ((signal.SIGTERM,), slice(-1, None), 75),
    "2 x SIGTERM": ((signal.SIGTERM,) * 2, slice(-1, None), 75),
    "SIGINT": ((signal.SIGINT,), slice(-1, None), 130),
    "lost last": ((signal.SIGKILL,), slice(-1, None), 75),
    "lost first": ((signal.SIGKILL,), slice(0, 1), 75),
}
"""Name -> signals, sent a moment apart; to which processes; the exit code of those that are not killed."""
LOST = ("lost last", "lost first")
"""Kinds that end one process of several: the others have to notice."""
MOMENTS = {"loading": 0.0, "first": 1.0, "middle": 0.5, "last": 1.0}
"""Name -> how far a stage has come when it is ended, as a part of all that it keeps or logs; `first` is one batch or
step, `loading` none: while it loads, encodes, compiles."""
LIMIT = 600
"""Seconds after which a run that has not come to where it should is given up."""


def begin(arguments: list[str], log: Path) -> int:
    """A process that runs `mpo run`; its number."""
    child = os.fork()
    if child:
        return child
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["mpo", "run", *arguments]
    allocator.restart = lambda: None  # it would begin another process, that imports everything again
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    become(mpo.main)


def become(work: Callable[[], object]) -> NoReturn:
    """Does some work in a forked process, and ends it as an interpreter ends."""
    code: int | str | None = 1
    try:
        work()
        code = 0
    except SystemExit as told:
        code = told.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def apart(work: Callable[[], object]) -> object:
    """What some work gives in a fork of its own, as JSON holds it: this process stays without JAX's threads."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        become(lambda: os.write(writing, json.dumps(work()).encode()))
    os.close(writing)
    with os.fdopen(reading) as stream:
        found = stream.read()
    ended([child])
    return json.loads(found)


def start(count: int, arguments: list[str], log: Path) -> list[int]:
    """`count` processes of a run; each writes to LOG.index."""
    port = processes.free_port()
    joined = [f"--coordinator=localhost:{port}", f"--processes={count}"] if count > 1 else []
    return [
        begin([*arguments, *joined, *([f"--process={index}"] if count > 1 else [])], log.with_suffix(f".{index}"))
        for index in range(count)
    ]


def ended(children: list[int]) -> list[int]:
    """Exit codes, once all have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def over(child: int) -> bool:
    """Whether a process has ended; it can be waited for still."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kept(folder: Path | None) -> list[Path]:
    """What a stage has kept so far: shards, and whole checkpoints."""
    if folder is None:
        return []
    return [*folder.glob(f"{SHARDS}/*/[0-9]*.npz"), *folder.glob(f"{CHECKPOINTS}/last/[0-9]*")]


def come(folder: Path | None) -> int:
    """How far a stage has come: batches that it has kept, and steps that it has logged."""
    if folder is None or not folder.exists():
        return 0
    lines = metrics.read(folder)
    return len([*folder.glob(f"{SHARDS}/*/[0-9]*.npz")]) + (int(lines[-1]["step"]) if lines else 0)


def whole(base: Path, arguments: list[str], log: Path, count: int) -> dict[str, int]:
    """Runs a graph that nothing disturbs; how far each of its stages comes before it is done."""
    children, furthest = start(count, arguments, log), dict[str, int]()
    while not over(children[0]):
        for folder in base.glob("*-*"):
            stage = folder.name.rsplit("-", 1)[0]
            if not (folder / MANIFEST).exists():
                furthest[stage] = max(furthest.get(stage, 0), come(folder))
        time.sleep(0.01)
    assert set(ended(children)) == {0}, log.with_suffix(".0").read_text()[-3000:]
    return furthest


def place(moment: str, furthest: int) -> int:
    """How far a stage is let come before it is ended."""
    if moment == "last":
        return max(1, furthest - 1)  # what was seen last is done before a signal arrives
    return min(1, furthest) if moment == "first" else int(MOMENTS[moment] * furthest)


def one(
    base: Path, work: Path, arguments: list[str], stage: str, kind: str, wanted: int, count: int, to_the_end: bool
) -> dict:
    """Runs a stage with the artifacts before it, ends it, runs it again; what came of it.

    to_the_end: whether it may be at its last batch when a signal arrives, behind which nothing is left to stop."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work, ignore=shutil.ignore_patterns(f"{stage}-*", CHECKPOINTS, "events", "cache"))
    arguments, log = [*arguments, f"--workdir={work}", f"--stages={stage}"], work.with_suffix(".log")
    for old in log.parent.glob(f"{log.stem}.[0-9]"):
        old.unlink()
    signals, to, expected = KINDS[kind]
    children = start(count, arguments, log)
    told = children[to]
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and not over(children[0]):
        folder = kills.folder(work, stage)
        if folder is not None and (folder / INPUTS).exists() and come(folder) >= wanted:
            break
        time.sleep(0.002)
    if not wanted:
        time.sleep(0.3)
    early = over(children[0])
    sent = time.time()
    for number in signals:
        for child in told:
            if not over(child):
                os.kill(child, number)
        time.sleep(0.1)
    codes = ended(children)
    took = time.time() - sent
    folder = kills.folder(work, stage)
    assert folder is not None, f"{codes}: {log.with_suffix('.0').read_text()[-3000:]}"
    last = max((path.stat().st_mtime for path in kept(folder)), default=(folder / INPUTS).stat().st_mtime)
    done = to_the_end and set(codes) == {0} and read_manifest(folder) is not None  # the batch at work was the last one
    lost = 0.0 if done else max(0.0, sent - last)
    again = ended(start(count, arguments, log))
    said = "".join(file.read_text() for file in sorted(log.parent.glob(f"{log.stem}.[0-9]")))
    right = [-signal.SIGKILL if signals[0] == signal.SIGKILL and child in told else expected for child in children]
    words = "another process of the run has ended" if kind in LOST else f"told to stop in stage {stage}"
    return {
        "stage": stage, "signal": kind, "at": wanted, "codes": codes, "early": early, "ended in": took,
        "lost": lost, "kept": len(kept(folder)), "again": again, "traceback": "Traceback" in said,
        "told": done or words in said or set(codes) == {-signal.SIGKILL},
        "differs": apart(lambda: kills.differences(kills.folder(base, stage), kills.folder(work, stage))),
        "right": early or done or codes == right,
    }  # fmt: skip


def failed(row: dict) -> bool:
    return bool(row["differs"] or row["traceback"] or not row["right"] or not row["told"] or any(row["again"]))


def line_of(row: dict) -> str:
    """A line of the table, with what was not as it should be."""
    found = (
        ("ended before", row["early"]), ("wrong exit", not row["right"]), ("traceback", row["traceback"]),
        ("not told", not row["told"]), (f"again {row['again']}", any(row["again"])),
    )  # fmt: skip
    notes = "".join(f"  {note}" for note, true in found if true)
    equal = "yes" if not row["differs"] else ", ".join(row["differs"])
    codes = ",".join(map(str, row["codes"]))
    place = f"{row['stage']:9} {row['signal']:12} {row['moment']:8} {codes:10}"
    return f"{place} {row['ended in']:10.1f} {row['lost']:7.2f}  {equal}{notes}"


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", default="tests/tools/kill_graph.py")
    parser.add_argument("--stages", default="")
    parser.add_argument("--signals", default=",".join(kind for kind in KINDS if kind not in LOST))
    parser.add_argument("--moments", default=",".join(MOMENTS))
    parser.add_argument("--processes", default=1, type=int)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, base, table = given.out / "rows.jsonl", given.out / "base", given.out / "matrix.jsonl"
    if not rows.exists():
        small_graph.write_rows(rows)
    arguments = [f"--config={given.config}", f"--config.model.path={given.model}", f"--config.data.path={rows}"]
    if not (given.out / "base.json").exists():
        for folder in base.glob("*-*"):  # of a run that was cut off; what it compiled stays
            shutil.rmtree(folder)
        only = [f"--stages={given.stages}"] if given.stages else []
        come_to = whole(base, [*arguments, f"--workdir={base}", *only], given.out / "base.log", given.processes)
        (given.out / "base.json").write_text(json.dumps(come_to))
    furthest = json.loads((given.out / "base.json").read_text())
    stages = given.stages.split(",") if given.stages else list(json.loads((base / "stages.json").read_text()))
    if missing := [stage for stage in stages if kills.folder(base, stage) is None]:
        sys.exit(f"{base}, which nothing disturbed, was made without {', '.join(missing)}: give another --out")
    lines = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    done = {(line["stage"], line["signal"], line["moment"]) for line in lines}
    wrong = 0
    print(f"{'stage':9} {'signal':12} {'moment':8} {'exit':10} {'ended in s':>10} {'lost s':>7}  bit-equal", flush=True)
    for moment in given.moments.split(","):
        for stage in stages:
            for kind in given.signals.split(","):
                if (stage, kind, moment) in done:
                    continue
                wanted = place(moment, furthest.get(stage, 0))
                row = one(base, given.out / "work", arguments, stage, kind, wanted, given.processes, moment == "last")
                row |= {"moment": moment, "of": furthest.get(stage, 0), "processes": given.processes}
                with table.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                wrong += failed(row)
                print(line_of(row), flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main_()
