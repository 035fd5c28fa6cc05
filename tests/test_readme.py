"""The README's commands enter, as they stand there but for paths and tiny settings; each runs and ends well.

The two entry scripts are run by hand, those of pods by tests/test_deploy.py.
"""

import gzip
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ("steps", "eval_every", "save_every", "eval_batches")
STAGES = ("sft", "reward", "dpo", "mpo")
SAMPLING = ("split", "split_sampled", "mpo", "mpo_sampled", "ppo_sft", "evaluate")
FLAGS = {
    "mpo_jax.main": [
        *(f"--config.stages.{stage}.{key}=1" for stage in STAGES for key in TINY),
        *(f"--config.stages.{stage}.batch_size=8" for stage in (*STAGES, "split")),
        "--config.data.max_length=96",
        "--config.data.max_prompt=64",
        "--config.data.max_response=24",
        "--config.data.max_buckets=1",
        *(f"--config.stages.{stage}.max_new_tokens=8" for stage in SAMPLING),  # a graph is checked whole
        "--stages=mpo",
    ],
    "mpo_jax.sample": ["--max_new_tokens=4"],
    "mpo_jax.plan": [
        "--topology=cpu",
        "--config.mesh.tensor=1",
        "--stages=dpo",
        "--config.stages.dpo.batch_size=2",
        "--config.stages.dpo.microbatch=0",
        "--config.data.max_length=320",
        "--config.data.max_prompt=32",
    ],
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python -m mpo_jax.")]


def test_every_module_of_the_readme_is_there_and_every_command_is_one_line():
    found = [shlex.split(command)[2] for command in commands()]
    assert set(found) == {f"mpo_jax.{name}" for name in ("show", "main", "sample", "export", "plan")}
    for module in found:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize(
    "script", re.findall(r"run_scripts/\w+\.sh|docs/\w+\.md|configs/\w+\.py", (ROOT / "README.md").read_text())
)
def test_every_file_that_the_readme_names_is_there(script):
    assert (ROOT / script).exists()


def test_the_commands_run_one_after_the_other(shared, tmp_path):
    with gzip.open(shared / "data/hh_rlhf/harmless-base/test.jsonl.gz", "rt") as file:
        (tmp_path / "pairs.jsonl").write_text("".join(line for line, _ in zip(file, range(160), strict=False)))
    places = {
        "MODEL": str(shared / "models/stories260K"),
        "pairs.jsonl": str(tmp_path / "pairs.jsonl"),
        "runs/mine": str(tmp_path / "mine"),
        "=exported": f"={tmp_path / 'exported'}",
        "--topology=v5e:4x8": f"--config.model.path={shared / 'models/stories260K'}",
    }
    for command in commands():
        for name, place in places.items():
            command = command.replace(name, place)
        words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, *words[1:], *FLAGS.get(words[2], [])],
            cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    assert (tmp_path / "mine/report.html").exists()
    assert (tmp_path / "exported/model.safetensors").exists()
