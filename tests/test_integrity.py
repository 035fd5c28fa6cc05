"""Every flipped bit and every cut of a finished stage's files is told by file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, integrity
from mpo_jax.data import encode
from mpo_jax.data.records import TextRecord
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError


@pytest.fixture
def stage(tmp_path):
    """A finished stage's folder, with weights, an array, JSON and JSON Lines."""
    folder = epath.Path(tmp_path / "dpo-0123")
    artifacts.write_json(folder / artifacts.CONFIG, {"name": "a", "stages": {"dpo": {"beta": 0.1}}})
    artifacts.write_lines(folder / artifacts.METRICS, [{"step": 1, "loss": 0.5}])
    artifacts.write_bytes(folder / artifacts.WEIGHTS / "d" / "0", np.arange(300, dtype=np.float32).tobytes())
    artifacts.write_arrays(folder / artifacts.GAPS, {"gap": np.ones(3, np.float32)})
    artifacts.write_bytes(folder / artifacts.CHECKPOINTS / "last" / "1", b"unread")
    artifacts.write_manifest(folder, {"name": "dpo", "kind": "dpo", "summary": {"loss": 0.5}})
    return folder


def files(folder):
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(path for path in found if artifacts.CHECKPOINTS not in path.parts)


def test_a_whole_stage_passes(stage):
    artifacts.verify(stage)
    assert artifacts.read_manifest(stage)["name"] == "dpo"
    listed = artifacts.read_manifest(stage)["files"]
    assert set(listed) == {"config.json", "metrics.jsonl", "weights/d/0", "gaps.npz"}


@pytest.mark.parametrize("seed", range(20))
def test_any_flipped_bit_is_told_by_file(stage, seed):
    random = np.random.default_rng(seed)
    for path in files(stage):
        content = bytearray(path.read_bytes())
        bit = int(random.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(content))
        # What no text can be, or no JSON, is told by file too.
        with pytest.raises(InputError, match=path.name):
            artifacts.verify(stage)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(content))
    artifacts.verify(stage)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_any_cut_and_any_missing_file_is_told(stage, share, tmp_path):
    for path in files(stage):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=path.name):
            artifacts.verify(stage)
        path.write_bytes(content)
    copy = epath.Path(shutil.copytree(stage, tmp_path / "copy"))
    (copy / artifacts.GAPS).unlink()
    with pytest.raises(InputError, match=r"gaps\.npz: missing; delete the folder copy"):
        artifacts.verify(copy)


def test_an_empty_object_is_no_finished_stage(tmp_path):
    (tmp_path / artifacts.MANIFEST).write_text("{}")
    with pytest.raises(InputError, match=r"manifest\.json: not a file that this package writes"):
        artifacts.read_manifest(tmp_path)


def test_weights_are_left_out_where_they_are_not_read(stage):
    path = stage / artifacts.WEIGHTS / "d" / "0"
    path.write_bytes(b"other")
    artifacts.verify(stage, weights=False)
    with pytest.raises(InputError, match="weights/d/0"):
        artifacts.verify(stage)


def test_a_seal_does_not_depend_on_the_order_of_keys():
    sealed = integrity.seal({"a": 1, "b": [1.5, None]})
    turned = json.loads(json.dumps(dict(reversed(sealed.items()))))
    assert integrity.unseal("x/y.json", turned) == {"a": 1, "b": [1.5, None]}


def test_damaged_rows_are_told_and_a_damaged_cache_is_made_again(tmp_path, capsys, shared):
    tokenizer = load_tokenizer(str(shared / "models/stories260K"))
    records = [TextRecord(f"Once {number}", " a cat.", " a dog.", number, "train") for number in range(4)]
    limits = encode.Limits(64, 16)
    made = encode.encode(records, tokenizer, 2, limits)  # in memory: not a map of what is damaged below
    encode.encode(records, tokenizer, 2, limits, tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    for name in ("tokens.npy", "manifest.json"):
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 4
        (folder / name).write_bytes(bytes(content))
        with pytest.raises(InputError, match=f"{name}: (damaged|not)"):
            encode.read(folder)
        again = encode.encode(records, tokenizer, 2, limits, tmp_path)
        assert np.array_equal(again.tokens, made.tokens) and name in capsys.readouterr().err
    (folder / "offsets.npy").write_bytes(b"")
    assert np.array_equal(encode.encode(records, tokenizer, 2, limits, tmp_path).offsets, made.offsets)


def test_hash_settings():
    assert integrity.hash_settings({"a": 1, "b": (1, 2)}) == integrity.hash_settings({"b": [1, 2], "a": 1})
    assert integrity.hash_settings({"a": 1}) != integrity.hash_settings({"a": 2})
    known = integrity.hash_settings({"threshold": 1.0, "kind": "split"})
    assert known == "c5080738c0bea988da93aa8456cbaeba", "a changed hash makes every finished stage run again"
    with pytest.raises(TypeError):
        integrity.hash_settings({"a": object()})
