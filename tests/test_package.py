"""The sources enter; the wheel that is made of them runs in an empty folder, with its configs by name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tools.processes import ENVIRONMENT, ROOT, WITHOUT_TORCH


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("mpo_jax", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copyfile(ROOT / name, folder / "source" / name)
    made = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([sys.executable, *made, str(folder / "source")], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{WITHOUT_TORCH}{os.pathsep}{site}"}
    command = [sys.executable, "-m", "mpo_jax.mpo", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("config", ["quickstart", "tldr", "hh_rlhf:debug", "sft"])
def test_a_shipped_config_goes_by_name_in_an_empty_folder(site, tmp_path, config):
    done = run(site, tmp_path, "run", f"--config={config}", "--workdir=q", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "└── sft [sft]" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_all_that_is_read_at_run_time_is_in_the_wheel(site):
    for file in (ROOT / "mpo_jax").rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            assert (site / "mpo_jax" / file.relative_to(ROOT / "mpo_jax")).is_file(), file
    assert "mpo = mpo_jax.mpo:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()


@pytest.mark.parametrize("command", ["run", "plan", "show", "sample", "export", "annotate", "report", "runs"])
def test_every_command_has_a_help(site, tmp_path, command):
    done = run(site, tmp_path, command, "--help")
    assert done.returncode == 0 and "Flags:" in done.stdout, done.stderr
    if command in ("run", "plan"):
        assert "learning_rate" in done.stdout and "of kind ppo" in done.stdout
