"""Whole graphs with their workdir in an object store, and on a file system that renames no folders: the same numbers as
on a local disk, bit by bit, after kills too."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from mpo_jax import artifacts, metrics, pipeline, sharding, store
from mpo_jax.models import hub
from mpo_jax.stages import kinds
from tests.conftest import absent
from tests.tools import processes, small_graph

QUICKSTART = "--config=configs/quickstart.py"


def numbers(workdir: epath.Path) -> dict[str, object]:
    """All that a finished run's stages say and hold, by name, but for what a clock tells."""
    found: dict[str, object] = {}
    for stage, (folder, manifest) in artifacts.finished_stages(workdir).items():
        found[stage] = manifest["summary"] | {"key": manifest["key"]}
        for name in (artifacts.WEIGHTS, artifacts.VALUE):
            if (folder / name).exists():
                found[f"{stage}/{name}"] = ocp.PyTreeCheckpointer().restore(folder / name)
        for file in (artifacts.REPORT, artifacts.JUDGE_TABLE, artifacts.STATISTICS):
            if (folder / file).exists():
                found[f"{stage}/{file}"] = artifacts.read_json(folder / file)
        if (folder / artifacts.GAPS).exists():
            found[f"{stage}/{artifacts.GAPS}"] = artifacts.read_arrays(folder / artifacts.GAPS)
        found[f"{stage}/metrics"] = [
            {name: value for name, value in row.items() if "second" not in name} for row in metrics.read(folder)
        ]
    return found


def assert_equal(found: object, expected: object, place: str = "") -> None:
    """The same to the last bit; what is not is named. What a clock tells is left out, and what the last process of a
    stage had to compile."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and sorted(found) == sorted(expected), place
        for name, value in expected.items():
            if "second" not in name and name != "compiles":
                assert_equal(found[name], value, f"{place}/{name}")
    elif hasattr(expected, "dtype"):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=place)
    else:
        assert found == expected or found != found, place


def small(stories: Path, folder: Path):
    """SFT, reward and split, DPO on what it calls easy: a few steps of each."""
    data = folder / "rows.jsonl"
    small_graph.write_rows(data)
    config = small_graph.get_config()
    del config.stages["mpo"], config.stages["pairs"]
    config.stages.reward.pairs = config.stages.split.pairs = "data"
    for stage in config.stages.values():
        few = {"steps": 4, "eval_every": 2, "save_every": 2}
        stage.update({name: value for name, value in few.items() if name in stage})
    config.model.path, config.data.path = str(stories), str(data)
    return config


@pytest.fixture(scope="module")
def local(stories, tmp_path_factory) -> tuple[object, dict[str, object]]:
    """The small graph's config, and its numbers on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    config = small(stories, folder)
    run(config, epath.Path(folder / "run"))
    return config, numbers(epath.Path(folder / "run"))


def run(config, workdir: epath.Path) -> None:
    pipeline.run(kinds.read(config.to_dict()), workdir, sharding.make_mesh(data=8, fsdp=1))


def test_workdir_model_and_data_in_a_store_that_fails_now_and_then(local, stories, gcs, monkeypatch, capsys):
    config, expected = local
    for file in stories.iterdir():
        gcs.put(f"small/model/{file.name}", file.read_bytes())
    gcs.put("small/rows.jsonl", Path(config.data.path).read_bytes())
    config = config.copy_and_resolve_references()
    config.model.path, config.data.path = "gs://bucket/small/model", "gs://bucket/small/rows.jsonl"
    gcs.fail_every = 60
    before = gcs.failed
    run(config, epath.Path("gs://bucket/small/run"))
    assert gcs.failed > before + 5
    gcs.fail_every = 0
    assert_equal(numbers(epath.Path("gs://bucket/small/run")), expected)
    # Another host finds all that it needs in the store.
    shutil.rmtree(store.scratch())
    monkeypatch.setattr(hub, "_fetched", {})
    capsys.readouterr()
    run(config, epath.Path("gs://bucket/small/run"))
    assert capsys.readouterr().out.count("done before") == len(config.stages)


@pytest.fixture(scope="session")
def no_renames(tmp_path_factory) -> Path:
    """The library that refuses to rename folders, compiled."""
    if shutil.which("gcc") is None:
        absent("no gcc")
    made = tmp_path_factory.mktemp("shim") / "no_folder_renames.so"
    source = Path(__file__).parent / "tools" / "no_folder_renames.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture
def refusing(no_renames, tmp_path, monkeypatch) -> Path:
    """A folder in which processes that the test starts can't rename folders; whatever tries is in its log beside it."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    monkeypatch.setenv("LD_PRELOAD", str(no_renames))
    monkeypatch.setenv("NO_FOLDER_RENAMES", str(folder.resolve()))
    monkeypatch.setenv("NO_FOLDER_RENAMES_LOG", str(tmp_path / "refused"))
    return folder


def refused(folder: Path) -> list[str]:
    log = folder.with_name("refused")
    return log.read_text().splitlines() if log.exists() else []


def test_the_file_system_refuses_to_rename_folders_alone(refusing):
    code = """
import os, sys
os.chdir(sys.argv[1])
os.mkdir("folder"); open("file", "w").close(); os.rename("file", "other")
for call in (lambda: os.rename("folder", "moved"), lambda: os.replace(sys.argv[1] + "/folder", "moved")):
    try:
        call()
    except OSError as error:
        print(error.strerror)
os.rename("folder", "moved") if not os.path.isdir("folder") else print(sorted(os.listdir()))
"""
    found = subprocess.run([sys.executable, "-c", code, refusing], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["Function not implemented"] * 2 + ["['folder', 'other']"]
    assert refused(refusing) == [str(refusing.resolve() / "folder")] * 2


def started(config, workdir: str | Path, file: Path) -> subprocess.Popen:
    """A run of a config in a process of its own, compiled as in this one."""
    file.write_text(json.dumps(config.to_dict()))
    code = (
        "import json, sys; from etils import epath; import tests.conftest; from mpo_jax import pipeline, sharding;"
        "from mpo_jax.stages import kinds; config = kinds.read(json.load(open(sys.argv[1])), from_json=True);"
        "pipeline.run(config, epath.Path(sys.argv[2]), sharding.make_mesh(data=8, fsdp=1))"
    )
    return subprocess.Popen([sys.executable, "-c", code, file, workdir], cwd=processes.ROOT)


def test_a_small_graph_where_no_folder_can_be_renamed(local, refusing):
    config, expected = local
    assert started(config, refusing / "run", refusing.with_name("config.json")).wait(600) == 0
    assert refused(refusing) == []
    assert_equal(numbers(epath.Path(refusing / "run")), expected)


def at_work(gcs, run: str, since: int) -> str:
    """The stage whose lock in a run's folder is younger than a generation; "" between stages."""
    prefix = f"{run}/{artifacts.LOCKS}/"
    with gcs.lock:
        found = [name for name, each in gcs.bucket.objects.items() if each.generation > since]
    names = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
    return next((name.rsplit("-", 1)[0] for name in names if name != artifacts.STAGES_FILE), "")


def newest(gcs) -> int:
    """The last generation that the store has given out."""
    with gcs.lock:
        return max((each.generation for each in gcs.bucket.objects.values()), default=0)


def stages_of(found: dict[str, object]) -> list[str]:
    """The stages of a run's numbers, in the order that they are run in."""
    return [name for name in found if "/" not in name]


def kill_ten_times(start, gcs, run: str, stages: list[str], seed: int, most: int = 120) -> list[str]:
    """Runs what `start` starts and kills it, ten times, spread over the stages: each after a number of calls to the
    store that is drawn, counted from when it has begun a stage, or as soon as that stage ends, so that a slow machine
    is killed at the same places. Every third time its host is gone with it. Gives the stages that it was at work on.
    """
    draw, places = random.Random(seed), []
    for kill in range(10):
        wanted, since = stages[kill * len(stages) // 10], newest(gcs)
        process = start()
        while at_work(gcs, run, since) != wanted and process.poll() is None:
            time.sleep(0.01)
        calls, target = gcs.calls, gcs.calls + draw.randint(1, most)
        while gcs.calls < target and at_work(gcs, run, since) == wanted and process.poll() is None:
            time.sleep(0.005)
        places.append(at_work(gcs, run, since))
        assert process.poll() is None, f"ended with {process.returncode} before it was killed in {wanted}"
        process.kill()
        process.wait()
        print(f"killed in {places[-1] or 'no stage'}, after {gcs.calls - calls} calls: {len(gcs.names())} objects")
        if kill % 3 == 2:
            shutil.rmtree(store.scratch(), ignore_errors=True)
    return places


@pytest.mark.slow
def test_a_small_graph_in_an_object_store_killed_ten_times(local, gcs, tmp_path):
    config, expected = local

    def start() -> subprocess.Popen:
        return started(config, "gs://bucket/killed", tmp_path / "config.json")

    stages = stages_of(expected)
    assert set(stages) <= set(kill_ten_times(start, gcs, "killed", stages, 1))
    assert start().wait(1200) == 0
    assert_equal(numbers(epath.Path("gs://bucket/killed")), expected)


# The whole quickstart: minutes of two cores --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> dict[str, object]:
    """The numbers of the quickstart on a local disk, never interrupted; compiled as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        patch.delenv("PJRT_NPROC", raising=False)
        workdir = tmp_path_factory.mktemp("quickstart") / "run"
        processes.run(1, [QUICKSTART, f"--workdir={workdir}"], workdir.parent / "log")
        yield numbers(epath.Path(workdir))


@pytest.mark.slow
def test_the_quickstart_in_an_object_store_killed_ten_times(quickstart, gcs, tmp_path):
    arguments, log = [QUICKSTART, "--workdir=gs://bucket/quickstart"], tmp_path / "log"
    stages = stages_of(quickstart)
    places = kill_ten_times(lambda: processes.start(1, arguments, log)[0], gcs, "quickstart", stages, 0)
    assert len(set(places) & set(stages)) >= len(stages) - 1, places
    processes.run(1, arguments, log)
    assert_equal(numbers(epath.Path("gs://bucket/quickstart")), quickstart)


@pytest.mark.slow
def test_the_quickstart_where_no_folder_can_be_renamed(quickstart, refusing):
    processes.run(1, [QUICKSTART, f"--workdir={refusing / 'run'}"], refusing.with_name("log"))
    assert refused(refusing) == []
    assert_equal(numbers(epath.Path(refusing / "run")), quickstart)
