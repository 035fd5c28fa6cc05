"""Several processes over loopback, as several hosts: the numbers of one process, one stop for all, other counts of
processes on resume, and no waiting without end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, metrics
from mpo_jax.errors import PREEMPTED
from mpo_jax.stages import corpus
from tests.tools import processes
from tests.tools.small_graph import write_rows

BARRIER = """
import sys
from mpo_jax import processes
processes.start(sys.argv[1].split("=")[1], int(sys.argv[2].split("=")[1]), int(sys.argv[3].split("=")[1]), False)
processes.barrier("begun")
if sys.argv[3].endswith("=0"):
    processes.barrier("saved", seconds=1)
print("went on")
"""


def folder(workdir: Path, stage: str) -> Path:
    return workdir / json.loads((workdir / "stages.json").read_text())[stage]


def curves(path: Path) -> dict[str, list[float]]:
    lines = metrics.read(path)
    names = {"loss", "grad_norm"} & set(lines[0])
    return {name: [line[name] for line in lines if name in line] for name in names}


@pytest.mark.parametrize(
    "given", [{"JAX_NUM_CPU_DEVICES": "4"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}]
)
def test_virtual_devices_have_threads_to_spare(given):
    """XLA runs each device's part of a program in a thread, where it waits for the others."""
    code = (
        "from mpo_jax import processes; processes.start(None, None, None, False)\n"
        "import jax, os; jax.numpy.ones(1).block_until_ready(); assert jax.device_count() == 4\n"
        "names = [open(f'/proc/self/task/{each}/comm').read() for each in os.listdir('/proc/self/task')]\n"
        "print(names.count('tf_XLAEigen\\n'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PJRT_NPROC", "XLA_FLAGS")}
    found = subprocess.run([sys.executable, "-c", code], env=environment | {"JAX_PLATFORMS": "cpu"} | given,
                           cwd=processes.ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    assert int(found.stdout) >= 12


def test_waiting_for_a_process_that_never_comes_ends_with_its_place(tmp_path):
    port = processes.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BARRIER, f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"],
            cwd=processes.ROOT,
            env={**os.environ, **processes.ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = started[0].communicate(timeout=120)[0]
    started[1].kill()
    started[1].communicate()
    assert "process 0 waited 1 s at 'saved' for the others: one died or hangs" in said
    assert "went on" not in said


@pytest.fixture(scope="module")
def command(tmp_path_factory, stories) -> list[str]:
    """The graph's flags, with the real tiny model and rows made for it."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(rows)
    return ["--config=tests/tools/small_graph.py", f"--config.model.path={stories}", f"--config.data.path={rows}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, command) -> Path:
    """The workdir of one process's run of the whole graph."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    processes.run(1, [*command, f"--workdir={workdir}"], workdir.parent / "log")
    return workdir


@pytest.fixture
def again(alone, command, tmp_path):
    """`(stage, count) -> folder`: one stage, made again from the same inputs by `count` processes."""

    def make(stage: str, count: int) -> Path:
        workdir = tmp_path / "run"
        shutil.copytree(alone, workdir)
        shutil.rmtree(folder(workdir, stage))
        processes.run(count, [*command, f"--workdir={workdir}", f"--stages={stage}"], tmp_path / "log")
        return folder(workdir, stage)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_curves_are_those_of_one_process(alone, again, stage, count):
    found, expected = curves(again(stage, count)), curves(folder(alone, stage))
    assert len(found["loss"]) == 50
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_completions_from_one_policy_are_those_of_one_process(alone, again, count):
    made, expected = again("pairs", count), folder(alone, "pairs")
    ours, theirs = ({*completions(path)} for path in (made, expected))
    assert len(ours & theirs) >= 0.99 * len(theirs)


def completions(path: Path) -> Iterator[tuple[bytes, ...]]:
    """Prompt and replies of every pair that a pairs stage sampled."""
    for share in ("sft_reward", "policy", "select", "report"):
        rows = corpus.read_rows(epath.Path(path) / share)
        yield from (tuple(piece.tobytes() for piece in rows.row(index)) for index in range(len(rows)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_ppo_step_is_that_of_one_process(alone, again, count):
    found = metrics.read(again("mpo", count))
    expected = metrics.read(folder(alone, "mpo"))
    for name in ("score", "response_len", "loss", "grad_norm", "approx_kl_k3", "entropy"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-4, abs=1e-4), name


@pytest.mark.slow
def test_a_notice_to_one_process_stops_all_and_another_count_goes_on(alone, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    shutil.rmtree(folder(workdir, "sft"))
    arguments = [*command, f"--workdir={workdir}", "--stages=sft"]
    started = processes.start(2, arguments, tmp_path / "log")
    lines = folder(workdir, "sft") / artifacts.METRICS
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and not (lines.exists() and len(metrics.read(lines.parent)) >= 3):
        assert all(each.poll() is None for each in started), (tmp_path / "log.0").read_text()[-4000:]
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    assert processes.finish(started) == [PREEMPTED, PREEMPTED]
    stopped = [
        step
        for step in range(50)
        if f"told to stop in stage sft, at step {step} of 50;" in (tmp_path / "log.0").read_text()
    ]
    assert len(stopped) == 1
    assert "told to stop in" not in (tmp_path / "log.1").read_text(), "process 0 alone speaks"
    processes.run(1, arguments, tmp_path / "resumed")
    assert "resumed" in (tmp_path / "resumed.0").read_text()
    np.testing.assert_allclose(curves(folder(workdir, "sft"))["loss"], curves(folder(alone, "sft"))["loss"], rtol=1e-4)
