"""The notebook enters; it is well formed, and runs from its first cell to its last on a CPU, with few steps."""

import os
import stat
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from mpo_jax import mpo
from tests import test_docs
from tests.tools.processes import ENVIRONMENT, ROOT

STAGES = {"sft": 2, "reward": 2, "dpo": 2, "mpo": 1, "dpo_all": 2, "ppo_sft": 1}
"""Trainings of the quickstart, and how many steps they take here."""
FEW = [
    *(f"--config.stages.{name}.steps={steps}" for name, steps in STAGES.items()),
    *(f"--config.stages.{name}.eval_batches=1" for name in STAGES),
    *(f"--config.stages.{name}.max_new_tokens=8" for name in ("pairs", "split", "mpo", "ppo_sft", "evaluate")),
    "--config.stages.pairs.samples=2", "--config.data.limit=300", "--config.stages.evaluate.count=16",
    "--config.stages.evaluate.bootstrap=100",
]  # fmt: skip


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)


def calls(notebook) -> list[list[str]]:
    """The words of every line that calls one of our commands."""
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").splitlines()
    return [line.removeprefix("!").split() for line in lines if line.startswith("!")]


def test_it_is_a_notebook_without_outputs_and_calls_what_there_is(notebook):
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    found = calls(notebook)
    assert {words[1] for words in found} == {"run", "sample", "export"}
    for name, command, *flags in found:
        assert name == "mpo" and command in mpo.COMMANDS
        defined = test_docs.module_of(command).read_text()
        for flag in (flag for flag in flags if flag.startswith("--")):
            assert f'"{flag.removeprefix("--").partition("=")[0]}"' in defined, flag


def test_its_links_lead_to_pages(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "(tutorial.md)" in text and (ROOT / "docs/tutorial.md").exists()


@pytest.mark.slow
def test_it_runs_with_few_steps(notebook, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "mpo"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mpo_jax.mpo "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    for name, value in (ENVIRONMENT | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    (given,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    given.source += f"\nflags = {' '.join(FEW)!r}"
    for cell in notebook.cells:  # a shell command that fails must fail the cell
        if cell.source.startswith("!"):
            cell.source += "\nassert _exit_code == 0"
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert Path(tmp_path, "runs/quickstart/report.html").exists()
    shown = {cell.id: str(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    assert "mpo" in shown["verdict"] and "iframe" in shown["report"] and "image/png" in shown["curves"]
    assert "verified" in shown["export"] and "Intended use" in shown["card"]
    assert "Once upon a time" in shown["transformers"]
