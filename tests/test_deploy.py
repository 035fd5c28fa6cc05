"""Scripts and manifests for rented machines: they say what they would do, and are sound as far as that can be told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*(ROOT / "run_scripts").glob("*.sh"), *(ROOT / "deploy").glob("*.sh")])


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", f"run_scripts/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    found = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", f"--source-path={ROOT}", path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stdout


def test_a_dry_run_of_a_pod_prints_every_command():
    done = call(
        "tpu_pod.sh", "--dry_run", "watch", BUCKET="things", NAME="mine", ZONE="us-west4-a", TYPE="v5litepod-64"
    )
    assert done.returncode == 0, done.stderr
    create, archive, folder, copy, *install, run = done.stdout.splitlines()
    assert "queued-resources create mine --zone=us-west4-a" in create and "--accelerator-type=v5litepod-64" in create
    assert archive.startswith("git archive") and "--worker=all" in copy and "install -d" in folder.replace("\\", "")
    assert "install.sh" in " ".join(install)
    assert "host.sh" in run and "--distributed" in run and "--workdir=gs://things/mine" in run


@pytest.mark.parametrize("script", ["tpu_pod.sh", "single_gpu.sh", "gke.sh", "host.sh"])
def test_help_and_what_is_missing(script):
    assert call(script, "--help").stdout.startswith(f"usage: run_scripts/{script}")
    assert call(script).returncode == 1


def test_a_pod_without_a_bucket_or_with_a_mistyped_command_is_told():
    assert "BUCKET: not set" in call("tpu_pod.sh", "--dry_run", "run", BUCKET="").stderr
    assert "unknown argument 'wotch'" in call("tpu_pod.sh", "wotch").stderr


def test_one_gpu_is_planned_before_it_is_used():
    plan, run = call(
        "single_gpu.sh", "--dry_run", "runs/one", "--stages=sft", MEMORY="24", RANK="8"
    ).stdout.splitlines()
    assert "mpo_jax.plan" in plan and "--topology=gpu:24GB" in plan
    assert "--stages=sft --needed" in plan, "what the run makes, with the stages beneath it"
    assert "mpo_jax.main" in run and f"--workdir={Path.cwd()}/runs/one --stages=sft" in run and "lora.rank=8" in run
    assert "--config=configs/tldr.py:debug\\,pythia-1b\\,lora" in run  # with the rates of adapters
    given = {"MEMORY": "24", "RANK": "8", "CONFIG": "mine.py"}
    assert "--config=mine.py " in call("single_gpu.sh", "--dry_run", "runs/one", **given).stdout


def test_one_gpu_gets_the_widest_training_that_fits(tmp_path):
    """A plan that finds no room for all weights, nor for adapters without remat, and a card of an H100's size."""
    for name, text in (
        (
            "python",
            'case "$*" in *plan*rank=0*|*plan*remat=none*) exit 2;; *plan*) echo figures;; *) echo "run $*";; esac',
        ),
        ("nvidia-smi", "echo 81559"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = call("single_gpu.sh", "runs/one", "--config.data.limit=9", **given)
    first, figures, run = done.stdout.splitlines()
    assert first == "fits a GPU of 80 GB: training LoRA adapters of rank 16, remat full" and figures == "figures"
    assert run.startswith("run -m mpo_jax.main") and run.endswith(
        f"--workdir={Path.cwd()}/runs/one --config.data.limit=9"
    )
    assert done.stderr.count("does not fit a GPU of 80 GB") == 3
    assert call("single_gpu.sh", "runs/one", RANK="0", **given).returncode == 2


def test_one_gpu_of_several_is_the_one_that_is_visible(tmp_path):
    """It is asked for by nvidia-smi's own option, and the run sees no other."""
    for name, text in (("python", 'case "$*" in *plan*) ;; *) echo "$CUDA_VISIBLE_DEVICES";; esac'),
                       ("nvidia-smi", 'test "$1 $2" = "-i 1" && echo 23034 || echo 81559')):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for visible, size, seen in (("1,0", 24, "1"), ("", 80, "0")):
        done = call("single_gpu.sh", "runs/one", CUDA_VISIBLE_DEVICES=visible, **given)
        assert f"fits a GPU of {size} GB" in done.stdout and done.stdout.splitlines()[-1] == seen


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (["--config.data.limit=5", "runs/one"], {}, "expected WORKDIR before other flags"),
        (["runs/one"], {"RANK": "abc"}, "RANK: 'abc'; expected a whole number"),
        (["runs/one", "--config.data.limit", "5"], {}, "write --config.data.limit=VALUE"),
    ],
)
def test_one_gpu_refuses_in_one_line(arguments, given, words):
    done = call("single_gpu.sh", *arguments, MEMORY="24", **given)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
