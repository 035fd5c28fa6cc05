"""A full disk: what is told, and that what was whole stays whole; what a run could do without.

The file system is a real one, of a few MiB; mounting it takes an administrator's rights.
"""

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from absl import logging
from etils import epath

from mpo_jax import artifacts, checkpoint, disk, integrity, locks, runs
from mpo_jax.checkpoint import Checkpoints
from mpo_jax.errors import InputError
from mpo_jax.metrics import MetricsWriter
from mpo_jax.types import TrainState

MIB = 1 << 20


@pytest.fixture
def small(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, left: int) -> Path:
    """Writes a file that leaves so many bytes free, to 4 KiB."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - left))
    return ballast


def state(step: int, size: int) -> TrainState:
    """A state of `size` bytes that no compression makes smaller."""
    params = {"w": jax.random.bits(jax.random.key(step), (size // 4,), jnp.uint32).view(jnp.float32)}
    return TrainState(jnp.int32(step), params, optax.EmptyState(), jax.random.key(7), {})


def bits(found: TrainState) -> bytes:
    return np.asarray(found.params["w"]).tobytes()


def test_a_state_without_room_is_refused_and_the_last_one_stays(small):
    folder = small / "checkpoints"
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state(1, 3 * MIB), {"at": 1})
        checkpoints.wait()
        ballast = fill(small, 2 * MIB)
        with pytest.raises(InputError, match=r"the checkpoint of step 2 needs 4\.00 MiB, and 2\.00 MiB are free; make"):
            checkpoints.save(2, state(2, 3 * MIB), {"at": 2})
        with pytest.raises(InputError, match="the best weights, of step 2, needs"):
            checkpoints.save_best(2, state(2, 3 * MIB).params)
        with pytest.raises(InputError, match="its weights needs"):
            checkpoint.save_weights(small / "weights", state(2, 3 * MIB).params)
        found, extra = checkpoints.restore(1, state(0, 3 * MIB))
        assert bits(found) == bits(state(1, 3 * MIB)) and extra == {"at": 1}
        ballast.unlink()
        checkpoints.save(2, state(2, 3 * MIB), {"at": 2})
    with Checkpoints(folder, keep=1) as checkpoints:
        assert bits(checkpoints.restore(2, state(0, 3 * MIB))[0]) == bits(state(2, 3 * MIB))


@pytest.mark.parametrize("left", [0, 64 << 10, 1 * MIB, 2 * MIB])
def test_a_disk_that_fills_up_amid_a_save_leaves_the_state_before(small, left, monkeypatch):
    """Others write too: what was free when a save began may be taken before it ends."""
    monkeypatch.setattr(disk, "check_room", lambda *_: None)
    folder = small / "checkpoints"
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state(1, 3 * MIB), {"at": 1})
    ballast = fill(small, left)

    def save():
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(2, state(2, 3 * MIB), {"at": 2})

    with pytest.raises(InputError, match="the disk is full"), disk.full_disk_told(small):
        save()
    ballast.unlink()
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert bits(checkpoints.restore(1, state(0, 3 * MIB))[0]) == bits(state(1, 3 * MIB))
        checkpoints.save(2, state(2, 3 * MIB), {"at": 2})
    with Checkpoints(folder, keep=1) as checkpoints:
        assert bits(checkpoints.restore(2, state(0, 3 * MIB))[0]) == bits(state(2, 3 * MIB))


def test_weights_that_fill_the_disk_can_be_written_again(small, monkeypatch):
    monkeypatch.setattr(disk, "check_room", lambda *_: None)
    ballast = fill(small, 1 * MIB)
    params = state(1, 3 * MIB).params
    with pytest.raises(InputError, match="the disk is full"), disk.full_disk_told(small):
        checkpoint.save_weights(small / "weights", params)
    assert not (small / "weights" / "commit_success.txt").exists()
    ballast.unlink()
    checkpoint.save_weights(small / "weights", params)
    again = checkpoint.restore_weights(small / "weights", params)
    assert np.asarray(again["w"]).tobytes() == np.asarray(params["w"]).tobytes()


def test_a_file_without_room_leaves_the_one_before(small):
    artifacts.write_json(small / "report.json", {"a": 1})
    ballast = fill(small, 8 << 10)
    with pytest.raises(InputError, match="small: the disk is full; make room there"), disk.full_disk_told(small):
        artifacts.write_bytes(small / "report.json", bytes(MIB))
    assert artifacts.read_json(small / "report.json") == {"a": 1}
    assert sorted(path.name for path in small.iterdir()) == ["ballast", "report.json"]
    ballast.unlink()


def test_metrics_on_a_full_disk_end_at_once(small):
    """TensorBoard's own writer would leave the loop waiting for a thread that is gone."""
    with MetricsWriter(small / "stage") as log:
        log.write(1, {"loss": 1.0})
    fill(small, 0)

    def train():
        with MetricsWriter(small / "stage", start=1) as log:
            for step in range(2, 2000):
                log.write(step, {f"metric_{number}": float(step) for number in range(20)})

    with pytest.raises(InputError, match="the disk is full"), disk.full_disk_told(small):
        train()


def test_a_full_disk_is_told_once(tmp_path, caplog, monkeypatch):
    """Orbax logs the error that it raises, and of each of TensorStore's writes that ends after Orbax has closed its
    event loop Python prints a traceback."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: printed.append(str(found.exc_value)))

    def write_ends_late():
        loop = asyncio.new_event_loop()
        promise, write = tensorstore.Promise.new()

        async def begin():
            task = asyncio.ensure_future(wait())
            await asyncio.sleep(0.01)
            return task

        async def wait():
            await write

        task = loop.run_until_complete(begin())
        loop.close()
        late = threading.Thread(target=promise.set_result, args=(5,))
        late.start()
        late.join()
        return task

    def save():
        tasks.append(write_ends_late())
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            logging.exception("a thread raised an exception")
            raise

    tasks = []  # one that is collected before it is done is told of
    with pytest.raises(InputError, match="the disk is full"), disk.full_disk_told(tmp_path):
        save()
    assert not printed
    assert not caplog.records
    tasks.append(write_ends_late())
    assert printed == ["Event loop is closed"]
    with disk.full_disk_told(tmp_path):
        logging.error("something else")
    assert caplog.messages == ["something else"]


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError("a disk"), ValueError("No model"), InputError("No space left on device is what a name says")):
        with pytest.raises(type(error), match=str(error)), disk.full_disk_told(tmp_path):
            raise error


@pytest.fixture
def run(tmp_path) -> epath.Path:
    """A run of two stages, sft finished and dpo not, with all that may lie about in its folder."""
    workdir = epath.Path(tmp_path / "run")
    old = time.time() - 2 * disk.ABANDONED
    folders = {"sft": "sft-0123456789ab", "dpo": "dpo-0123456789ab"}
    artifacts.write_json(workdir / artifacts.STAGES_FILE, folders)
    for name in (*folders.values(), "dpo-ba9876543210", "set_aside/dpo-0123456789ab-1234"):
        artifacts.write_json(workdir / name / artifacts.INPUTS, {})
        artifacts.write_bytes(workdir / name / artifacts.CHECKPOINTS / "last" / "1" / "array", bytes(1000))
        artifacts.write_bytes(workdir / name / artifacts.WEIGHTS / "array", bytes(500))
        torn = workdir / name / f".{artifacts.CONFIG}.{'0' * 32}"
        torn.write_bytes(bytes(10))
        os.utime(torn, (old, old))
    artifacts.write_manifest(workdir / "sft-0123456789ab", {"name": "sft", "kind": "sft"})
    artifacts.write_bytes(workdir / artifacts.CACHE / "rows" / "tokens.npy", bytes(300))
    half = workdir / artifacts.CACHE / f".rows-{'1' * 32}"
    artifacts.write_bytes(half / "tokens.npy", bytes(20))
    os.utime(half, (old, old))
    fresh = workdir / artifacts.CACHE / f".rows-{'2' * 32}"  # a process may be writing it
    artifacts.write_bytes(fresh / "tokens.npy", bytes(30))
    for name in (artifacts.COMPILED, "mine-0123456789ab"):
        artifacts.write_bytes(workdir / name / "file", bytes(40))
    artifacts.write_bytes(workdir / artifacts.JUDGE_CACHE, bytes(50))
    return workdir


def relative(run) -> dict[str, int]:
    return {str(each.path.relative_to(run)): each.size for each in disk.spare(run)}


def test_what_the_present_graph_does_not_need(run):
    assert set(relative(run)) == {
        "set_aside/dpo-0123456789ab-1234",
        "sft-0123456789ab/checkpoints",
        f"sft-0123456789ab/.config.json.{'0' * 32}",
        f"dpo-0123456789ab/.config.json.{'0' * 32}",
        "dpo-ba9876543210",
        f"cache/.rows-{'1' * 32}",
    }
    assert relative(run)["sft-0123456789ab/checkpoints"] == 1000
    # All is finished: no stage reads the cache any more.
    artifacts.write_manifest(run / "dpo-0123456789ab", {"name": "dpo", "kind": "dpo"})
    assert {"cache", "dpo-0123456789ab/checkpoints"} <= set(relative(run))


def test_prune_shows_and_then_deletes_nothing_that_is_needed(run):
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}

    before = files()
    shown = runs.prune(run)
    assert files() == before and "with --yes deletes these files" in shown
    assert f"sft-0123456789ab{os.sep}checkpoints  training states of a finished stage" in shown
    assert "freed" in runs.prune(run, delete=True)
    after = files()
    needed = ("sft-0123456789ab/weights", "dpo-0123456789ab/weights", "dpo-0123456789ab/checkpoints", "cache/rows/")
    needed += ("mine", "stages.json", "compiled", "judge.sqlite")
    kept = {path: content for path, content in before.items() if str(path.relative_to(run)).startswith(needed)}
    assert len(kept) == 8 and kept.items() <= after.items()
    artifacts.verify(run / "sft-0123456789ab")
    assert runs.prune(run) == "  nothing to free"


def test_prune_deletes_nothing_while_a_run_is_at_work(run):
    with locks.held(run / artifacts.LOCKS / "dpo-0123456789ab.json", "stage dpo"):
        assert "states of a finished stage" in runs.prune(run)
        with pytest.raises(InputError, match="dpo-0123456789ab is being worked on by process"):
            runs.prune(run, delete=True)
    assert "freed" in runs.prune(run, delete=True)


def test_an_error_names_what_to_delete_with_its_size(run, monkeypatch):
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=5 * MIB))
    with pytest.raises(InputError) as told:
        disk.check_room(run / "dpo-0123456789ab" / artifacts.CHECKPOINTS, 6 * MIB, "the checkpoint of step 4")
    assert "the checkpoint of step 4 needs 6.00 MiB, and 5.00 MiB are free; `mpo runs --prune" in str(told.value)
    assert "dpo-ba9876543210 (1.48 KiB, a stage that is not in the present graph)" in str(told.value)
    assert "\n" not in str(told.value)
    disk.check_room(run, 5 * MIB, "a checkpoint")
    disk.check_room("gs://bucket/run", 1 << 60, "a checkpoint")


def test_what_a_manifest_lists_is_not_spare(run):
    """An earlier version took the leavings of a killed process for files of the stage."""
    folder, torn = run / "sft-0123456789ab", f".config.json.{'0' * 32}"
    manifest = artifacts.read_manifest(folder)
    assert torn not in manifest["files"]
    listed = integrity.seal(manifest | {"files": manifest["files"] | {torn: integrity.of_file(folder / torn)}})
    artifacts.write_json(folder / artifacts.MANIFEST, listed)
    assert f"sft-0123456789ab/{torn}" not in relative(run)
    runs.prune(run, delete=True)
    artifacts.verify(folder)
