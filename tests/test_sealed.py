"""Every flipped bit and every cut of an unfinished stage's checkpoints is told by file, or changes nothing."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.checkpoint import Checkpoints
from mpo_jax.errors import InputError
from mpo_jax.types import TrainState

UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes for people and its own log: when a checkpoint was made, and that it is complete."""


def state(step: int) -> TrainState:
    weights = np.random.default_rng(step).normal(size=(64, 96)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(weights)}, (), jax.random.key(step))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """States of steps 1 and 2, and the best of step 2."""
    made = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(made) as checkpoints:
        checkpoints.save(1, state(1), {"at": 1})
        checkpoints.save_best(2, state(2).params)
        checkpoints.save(2, state(2), {"at": 2})
    return made


def resume(folder: Path) -> tuple[bytes, bytes, dict]:
    """What a stage that resumes, and at its end takes the best, reads."""
    with Checkpoints(folder) as checkpoints:
        found, extra = checkpoints.restore(checkpoints.latest_step(), state(0))
        best = checkpoints.restore_best(2, state(0).params)
    return np.asarray(found.params["w"]).tobytes(), np.asarray(best["w"]).tobytes(), extra


def damaged(folder: Path, change) -> list[Path]:
    """Changes each file of the newest state and of the best in turn. The files whose change changed nothing; all
    others were named."""
    expected, harmless = resume(folder), []
    files = [path for part in ("last/2", "best/2") for path in sorted((folder / part).rglob("*")) if path.is_file()]
    assert len(files) > 20
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        told = error_of(folder, expected)
        path.write_bytes(whole)
        if not told:
            harmless.append(path)
        else:
            assert told.startswith(f"{path}: ") and "; delete the folder " in told
    return harmless


def error_of(folder: Path, expected: tuple) -> str:
    """What a resume tells, or "" where it reads what is expected."""
    try:
        assert resume(folder) == expected
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_bit_is_told_by_file_or_changes_nothing(folder, seed):
    random = np.random.default_rng(seed)

    def flip(content: bytes) -> bytes:
        bit, changed = int(random.integers(8 * len(content))), bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    assert {path.name for path in damaged(folder, flip)} == set(UNREAD)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_any_cut_is_told_by_file_or_changes_nothing(folder, share):
    harmless = damaged(folder, lambda content: content[: int(share * len(content))])
    assert {path.name for path in harmless} == set(UNREAD)


def test_the_state_before_is_told_and_goes_on_when_the_damaged_one_is_deleted(folder, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    (copy / "last/2/state/checksums.json").unlink()
    told = "delete the folder checkpoints/last/2, and the same command resumes from the one before, of step 1"
    with pytest.raises(InputError, match=rf"checksums\.json: missing; {told}"):
        resume(copy)
    shutil.rmtree(copy / "last/2")
    with Checkpoints(copy) as checkpoints:
        found, extra = checkpoints.restore(checkpoints.latest_step(), state(0))
    assert int(found.step) == 1 and extra == {"at": 1}
    (copy / "last/1/extra/metadata").write_text("{}")
    again = "delete the folder checkpoints/last/1, and the same command begins the stage again"
    with pytest.raises(InputError, match=again), Checkpoints(copy) as checkpoints:
        checkpoints.restore(1, state(0))
