"""Runs are stopped and killed while they sample, score and train; what they leave is what an undisturbed run leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import processes


def matrix(stories: Path, out: Path, *flags: str) -> str:
    """The table of `tests.tools.matrix`. AssertionError, with the table, where a line of it is wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.matrix", f"--model={stories}", f"--out={out}", *flags],
        cwd=processes.ROOT, env=os.environ | processes.ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_sampling_that_is_killed_or_stopped_goes_on_bit_equal(stories, tmp_path):
    told = matrix(
        stories, tmp_path, "--config=tests/tools/kill_graph.py:pairs", "--signals=SIGKILL,SIGTERM", "--moments=middle"
    )
    assert told.count(" yes") == 2 and "ended before" not in told, told


@pytest.mark.slow
def test_every_kind_of_stage_under_every_signal_at_four_moments(stories, tmp_path):
    assert matrix(stories, tmp_path).count(" yes") == 9 * 4 * 4


@pytest.mark.slow
def test_two_processes_of_which_one_is_told(stories, tmp_path):
    stages = "--stages=sft,pairs,split,evaluate"
    matrix(stories, tmp_path, stages, "--signals=SIGTERM,SIGINT", "--moments=middle", "--processes=2")
