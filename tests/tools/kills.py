"""A command that runs stages enters; it is killed at random instants and run again, and what its stages left is read.

`run_killed` takes any run of `mpo_jax.main`; `weights`, `folder` and `last_step` read a stage's artifact, `differences`
compares two.
"""

import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpo_jax import metrics
from mpo_jax.artifacts import read_manifest
from tests.tools import processes

LIMIT = 1200
"""Seconds after which a run that has not come to where it should is given up."""


def run_killed(
    arguments: list[str], workdir: Path, stage: str, steps: int, kills: int, seed: int, script: str = "mpo_jax.main"
) -> list[int]:
    """Runs a command, kills it with SIGKILL `kills` times while `stage` is at work, and runs it to its end.

    Every instant is drawn: a step of the stage's `steps`, later each time, and a part of a second after it, so that
    kills fall into steps, evaluations and saves. arguments: of the command, --workdir excepted. script: the module it
    is. Returns the last step written before each kill.
    """
    arguments, log = [*arguments, f"--workdir={workdir}"], workdir.parent / f"{workdir.name}.log"
    draw, found = random.Random(seed), []
    for target in sorted(draw.sample(range(1, steps), kills)):
        (process,) = processes.start(1, arguments, log, script)
        try:
            deadline = time.monotonic() + LIMIT
            while last_step(workdir, stage) < target and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(draw.random() / 4)
            assert process.poll() is None, f"ended with {process.returncode} before it could be killed"
        finally:
            process.kill()
            process.wait()
        found.append(last_step(workdir, stage))
    processes.run(1, arguments, log, script)
    return found


def folder(workdir: Path, stage: str) -> Path | None:
    """A stage's folder, once it has begun."""
    return next(iter(workdir.glob(f"{stage}-*")), None)


def last_step(workdir: Path, stage: str) -> int:
    """The last step that a stage has written to its metrics; 0 before."""
    found = folder(workdir, stage)
    lines = metrics.read(found) if found is not None else []
    return int(lines[-1]["step"]) if lines else 0


def weights(workdir: Path, stage: str) -> Any:
    """The final weights of a stage, as NumPy arrays."""
    found = folder(workdir, stage)
    assert found is not None
    return numbers(found / "weights")


def numbers(path: Path) -> Any:
    """Saved weights as NumPy arrays: another number of processes may have saved them."""
    import orbax.checkpoint as ocp

    shapes = ocp.PyTreeCheckpointHandler().metadata(path).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return ocp.PyTreeCheckpointer().restore(path, restore_args=as_numpy)


def differences(one: Path | None, two: Path | None) -> list[str]:
    """The files of a finished stage that are not those of another: by their checksums; of logged steps all but times,
    of weights the numbers."""
    if one is None or two is None or read_manifest(two) is None:
        return ["unfinished"]
    sums = [dict((read_manifest(each) or {})["files"]) for each in (one, two)]
    names = [
        name for name in sorted(sums[0].keys() | sums[1].keys())
        if sums[0].get(name) != sums[1].get(name)
        and not name.startswith(("weights/", "value/", "snapshots/"))
        and name not in ("metrics.jsonl", "config.json", "wandb_id")
    ]  # fmt: skip
    if (one / "metrics.jsonl").exists() and logged(one) != logged(two):
        names.append("metrics.jsonl")
    snapshots = {f"snapshots/{path.name}" for each in (one, two) for path in (each / "snapshots").glob("*")}
    for name in ("weights", "value", *sorted(snapshots)):
        if (one / name).exists() != (two / name).exists() or (
            (one / name).exists() and not same(one / name, two / name)
        ):
            names.append(name)
    return names


def logged(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): value
        for line in metrics.read(folder)
        for name, value in line.items()
        if name not in ("step", "seconds", "tokens_per_second") and "seconds" not in name
    }


def same(one: Path, two: Path) -> bool:
    read = [jax.tree.leaves(numbers(path)) for path in (one, two)]
    return len(read[0]) == len(read[1]) and all(np.array_equal(a, b) for a, b in zip(*read, strict=True))
