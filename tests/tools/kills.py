"""A command that runs stages enters; it is killed at random instants and run again, and what its stages left is read.

`run_killed` takes any run of `mpo_jax.main`; `weights`, `folder` and `last_step` read a stage's artifact.
"""

import random
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpo_jax import metrics
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
