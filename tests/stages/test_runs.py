"""Runs of SFT and reward model on real pairs, started as a user starts them; killed, and on several processes, they
end with the same numbers."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from mpo_jax import metrics
from tests.tools import kills, processes

DEBUG, STEPS = "--config=tests/configs/stories_hh.py:debug", 16
SCRIPT = "tests.tools.main"
STAGES = ("sft", "reward")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared) -> Path:
    """The workdir of an uninterrupted run on one device."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    processes.run(1, [DEBUG, f"--workdir={workdir}"], workdir.parent / "log", SCRIPT)
    return workdir


def summary(workdir: Path, stage: str) -> dict:
    folder = kills.folder(workdir, stage)
    assert folder is not None
    return json.loads((folder / "manifest.json").read_text())["summary"]


def losses(workdir: Path, stage: str) -> list[float]:
    return [loss for _, loss in metrics.curve(kills.folder(workdir, stage), "loss")]


def assert_same_weights(workdir: Path, other: Path) -> None:
    for stage in STAGES:
        one, two = (jax.tree_util.tree_leaves_with_path(kills.weights(place, stage)) for place in (workdir, other))
        assert [path for path, _ in one] == [path for path, _ in two]
        for (path, left), (_, right) in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=f"{stage}{path}")


def test_sft_then_reward_model(whole):
    sft, reward = summary(whole, "sft"), summary(whole, "reward")
    heldout = [value for _, value in metrics.curve(kills.folder(whole, "sft"), "eval/loss")]
    assert heldout[-1] < heldout[0]
    for stage in (sft, reward):
        assert stage["buckets"] < stage["compiles"] <= 2 * stage["buckets"], "steps, and evaluations"
        assert stage["compiles_after_warmup"] == 0
    report = reward["report"]
    assert set(report["baselines"]) == {"shorter_wins", "tfidf_bradley_terry"}
    assert {"accuracy", "calibration", "gap_histogram", "score_length_correlation"} <= set(report)
    output = (whole.parent / "log.0").read_text()
    for stage in (sft, reward):
        told = f"padding efficiency {stage['padding_efficiency']:.3f} in {stage['buckets']} buckets; 0 compiles"
        assert told in output
    assert re.search(r"reward model: 0\.\d+ ± .* 'the shorter reply wins' 0\.\d+, TF-IDF Bradley-Terry 0\.\d+", output)


@pytest.mark.slow
def test_killed_five_times_in_each_stage_ends_with_the_same_parameters(whole, tmp_path):
    """In small, within one process: tests/stages/test_loop.py."""
    workdir = tmp_path / "run"
    for seed, stage in enumerate(STAGES):
        at = kills.run_killed(
            [DEBUG, f"--stages={stage}"], workdir, stage, steps=STEPS, kills=5, seed=seed, script=SCRIPT
        )
        print(f"{stage}: killed after steps {at}")
    assert_same_weights(whole, workdir)
    for stage in STAGES:
        assert losses(workdir, stage) == losses(whole, stage)


def curves_agree(expected: Path, found: Path, stage: str, steps: int) -> None:
    want, got = losses(expected, stage), losses(found, stage)
    assert len(want) == steps
    print(f"{stage}, {found.name}: largest difference {np.abs(np.subtract(got, want)).max():.2e}")
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_two_processes_have_the_loss_curve_of_one(whole, tmp_path):
    workdir = tmp_path / "two"
    processes.run(2, [DEBUG, f"--workdir={workdir}", "--stages=sft"], tmp_path / "log", SCRIPT, devices=2)
    curves_agree(whole, workdir, "sft", STEPS)


def test_two_slices_have_the_loss_curve_of_one_device(whole, tmp_path):
    """`data` goes from slice to slice, here from process to process, and fsdp stays within one."""
    workdir, over = tmp_path / "slices", ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    arguments = [DEBUG, f"--workdir={workdir}", "--stages=sft", *over]
    processes.run(2, arguments, tmp_path / "log", "tests.tools.slices", devices=2)
    assert "processes of data: [[1], [0]]" in (tmp_path / "log.0").read_text()
    curves_agree(whole, workdir, "sft", STEPS)


@pytest.mark.slow
def test_fifty_steps_on_one_device_eight_two_processes_and_two_slices(shared, tmp_path):
    steps = 50

    def run(name, count, devices, *flags, script=SCRIPT):
        lengths = [f"--config.stages.{stage}.{key}={steps}" for stage in STAGES for key in ("steps", "eval_every")]
        arguments = [DEBUG, f"--workdir={tmp_path / name}", *lengths, *flags]
        processes.run(count, arguments, tmp_path / f"{name}.log", script, devices)

    run("one", 1, 1)
    run("eight", 1, 8)
    run("two", 2, 4)
    run("tensor", 2, 4, "--config.mesh.tensor=2")
    over = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    run("slices", 2, 4, *over, script="tests.tools.slices")
    for stage in STAGES:
        for name in ("eight", "two", "tensor", "slices"):
            curves_agree(tmp_path / "one", tmp_path / name, stage, steps)
