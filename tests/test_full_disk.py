"""A disk that is full in the midst of each kind of stage, on a real file system: one line, and once there is room again
the same command leaves the same files and numbers. Prints the table."""

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mpo_jax import artifacts
from tests.tools import kills, processes
from tests.tools.small_graph import write_rows

SCRIPT, MOMENTS = "tests.tools.main", 3
ROOM = 256 << 20


@pytest.fixture
def small(tmp_path):
    """A file system of 256 MiB; mounting one takes an administrator's rights."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def done(workdir: Path, stage: str) -> bool:
    folder = kills.folder(workdir, stage)
    return folder is not None and (folder / artifacts.MANIFEST).exists()


def length(workdir: Path, stage: str) -> float:
    """Seconds that a finished stage took, loading and compiling included."""
    folder = kills.folder(workdir, stage)
    assert folder is not None
    return (folder / artifacts.MANIFEST).stat().st_mtime - (folder / artifacts.INPUTS).stat().st_mtime


def run_full(
    count: int, arguments: list[str], small: Path, workdir: Path, stage: str, wait: float
) -> tuple[list[int], list[str]]:
    """Runs a command in `count` processes and, so many seconds after a stage has begun, fills the disk and keeps it
    full until all of them have ended. Of each its exit code and what it printed of errors."""
    ballast, log = small / "ballast", workdir.parent.parent / "full.log"
    running = processes.start(count, [*arguments, f"--workdir={workdir}", f"--stages={stage}"], log, SCRIPT)
    deadline = time.monotonic() + kills.LIMIT

    def goes_on() -> bool:
        return any(each.poll() is None for each in running) and time.monotonic() < deadline

    while kills.folder(workdir, stage) is None and goes_on():
        time.sleep(0.01)
    time.sleep(wait)
    with ballast.open("wb", buffering=0) as file:
        while goes_on():
            if (left := shutil.disk_usage(small).free) > 0:
                try:
                    file.write(bytes(left))
                except OSError:  # the run was quicker
                    continue
            time.sleep(0.002)
    codes = processes.finish(running, timeout=1)
    ballast.unlink()
    texts = [log.with_suffix(f".{index}").read_text().split("\n") for index in range(count)]
    return codes, ["\n".join(line for line in text if line.startswith(("error:", "Traceback"))) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_each_stage_of_a_graph_survives_a_full_disk(small, tmp_path, stories, count):
    write_rows(tmp_path / "rows.jsonl")
    arguments = [
        "--config=tests/tools/kill_graph.py",
        f"--config.model.path={stories}",
        f"--config.data.path={tmp_path / 'rows.jsonl'}",
    ]
    whole, workdir = tmp_path / "whole", small / "run"
    processes.run(count, [*arguments, f"--workdir={whole}"], tmp_path / "whole.log", SCRIPT)
    stages = list(artifacts.stage_folders(whole))
    draw, rows, met = random.Random(0), [], 0
    for stage in stages:
        for _ in range(MOMENTS):
            if done(workdir, stage):
                break
            codes, told = run_full(count, arguments, small, workdir, stage, draw.random() * length(whole, stage) / 2)
            assert set(codes) in ({0}, {1}), (codes, told)
            assert not any("Traceback" in each or "\n" in each for each in told), told
            full = [each for each in told if "the disk is full" in each or " are free; " in each]
            assert bool(full) == (codes[0] == 1), told
            met += codes[0]
            rows.append((stage, full[0].replace(str(workdir), "")[:100] if full else "done before it was full"))
        processes.run(count, [*arguments, f"--workdir={workdir}", f"--stages={stage}"], tmp_path / "again.log", SCRIPT)
    print("\n".join(f"{stage:8} {told}" for stage, told in rows))
    assert met >= len(stages), "hardly any stage met a full disk"
    for stage in stages:
        found = kills.differences(kills.folder(whole, stage), kills.folder(workdir, stage))
        assert set(found) <= {artifacts.INPUTS}, (stage, found)  # it names folders of the workdir
        assert not (kills.folder(workdir, stage) / artifacts.CHECKPOINTS).exists()
