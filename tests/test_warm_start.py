"""A run whose stages are all done is started again, in a process of its own; what that imports is looked at."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from configs import quickstart
from mpo_jax import artifacts, graph, pipeline, recipes, sharding, states
from mpo_jax.errors import InputError
from mpo_jax.run import as_json
from mpo_jax.stages import kinds
from tests.conftest import ROOT

HEAVY = (
    "datasets", "jax.experimental.pallas.tpu", "matplotlib", "mpo_jax.planning", "orbax", "scipy", "sklearn",
    "tensorstore", "torch", "transformers",
)  # fmt: skip
"""What only stages that run need; together they took two thirds of the start of a finished run."""

START = """
import sys
from mpo_jax import main
try:
    main.run()
finally:
    print("imported:", *(name for name in HEAVY if any(f"{each}.".startswith(f"{name}.") for each in sys.modules)))
"""


@pytest.fixture
def finished(tmp_path):
    """The flags of the quickstart in a folder in which all its stages are done, as far as a start looks."""
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    config = kinds.read(quickstart.get_config().to_dict())
    workdir = epath.Path(tmp_path / "run")
    nodes = graph.resolve(config, workdir)
    for node in nodes.values():
        artifacts.write_json(node.folder / artifacts.CONFIG, as_json(config))
        artifacts.write_json(node.folder / artifacts.INPUTS, states.inputs(nodes, node))
        artifacts.write_manifest(node.folder, {"name": node.name, "kind": node.kind, "made": "once", "summary": {}})
    artifacts.write_text(workdir / artifacts.REPORT_PAGE, "a page")
    later = time.time() + 5
    os.utime(workdir / artifacts.REPORT_PAGE, (later, later))
    return flags


def start(flags):
    script = START.replace("HEAVY", repr(HEAVY))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # with torch
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    return done.stdout, done.stderr


def test_the_start_of_a_finished_run_imports_nothing_that_stages_alone_need(finished):
    told, errors = start(finished)
    assert "  to do    nothing\n" in told and "stage 9 of 9: " in told, told + errors
    assert told.split("imported:")[1].split() == []


def test_what_a_stage_that_will_run_needs_is_checked_before_the_first(tmp_path, stories):
    """The tokenizer, which the start of a finished run does not load, is refused before any stage begins."""
    (tmp_path / "model").mkdir()
    for path in stories.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    rows = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    config = recipes.config()
    config.model.path, config.data.path = str(tmp_path / "model"), str(tmp_path / "rows.jsonl")
    config.stages.sft = recipes.stage("sft", batch_size=8)
    run = kinds.read(config.to_dict())
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(InputError, match="no tokenizer can be loaded from here"):
        pipeline.run(run, workdir, sharding.make_mesh(data=1, fsdp=8))
    assert not list(workdir.glob("sft-*"))


def test_programs_are_found_again_in_a_workdir_of_another_name(tmp_path, monkeypatch):
    """What a run compiled serves a copy of it, or where JAX_COMPILATION_CACHE_DIR says, a run beside it."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    flags = ["--config=sft", "--config.stages.sft.steps=1", "--config.stages.sft.eval_batches=1"]

    def compiled(name: str, **environment) -> set[str]:
        workdir = tmp_path / name
        kept = environment.get("JAX_COMPILATION_CACHE_DIR", workdir / artifacts.COMPILED)
        command = [sys.executable, "-m", "mpo_jax.main", *flags, f"--workdir={workdir}"]
        everything = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        subprocess.run(command, cwd=ROOT, env=os.environ | everything | environment, check=True, timeout=600)
        return {path.name for path in Path(kept).glob("*-cache")}

    first = compiled("first")
    assert any(name.startswith("jit_train") for name in first)
    shutil.copytree(tmp_path / "first" / artifacts.COMPILED, tmp_path / "second" / artifacts.COMPILED)
    assert compiled("second") == first
    assert compiled("third", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "first" / artifacts.COMPILED)) == first
    assert not (tmp_path / "third" / artifacts.COMPILED).exists()
