"""Hashes of models and data: what enters them, and that a kept one is never of another content."""

import json
import os
import time
from pathlib import Path

import pytest
from etils import epath

from mpo_jax import fingerprints
from mpo_jax.errors import InputError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory) -> Path:
    """The user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that were read to be hashed; a hash is kept of everything."""
    found: list[str] = []
    digest = fingerprints._digest
    monkeypatch.setattr(fingerprints, "_digest", lambda file: found.append(file.name) or digest(file))
    monkeypatch.setattr(fingerprints, "WORTH", 1)
    monkeypatch.setattr(fingerprints, "SETTLED", 0.05)
    return found


def settle() -> None:
    time.sleep(0.1)


def model_folder(path: Path, **changed: str) -> Path:
    files = {"config.json": "{}", "model.safetensors": "abc", "tokenizer.json": "{}", "merges.txt": "a b"} | changed
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_fingerprint_of_a_model_folder(tmp_path):
    first = fingerprints.of_model(model_folder(tmp_path / "a"))
    assert fingerprints.of_model(model_folder(tmp_path / "b")) == first
    unread = {"README.md": "new", "pytorch_model.bin": "x", ".cache/download.json": "{}"}
    assert fingerprints.of_model(model_folder(tmp_path / "c", **unread)) == first
    for name in ("config.json", "model.safetensors", "merges.txt"):
        folder = model_folder(tmp_path / name, **{name: json.dumps("other")})
        assert fingerprints.of_model(folder) != first, name
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no model files"):
        fingerprints.of_model(tmp_path / "empty")


def test_fingerprint_of_files(tmp_path):
    (tmp_path / "one.jsonl").write_text("x")
    (tmp_path / "two.jsonl").write_text("x")
    assert fingerprints.of_files(tmp_path / "one.jsonl") == fingerprints.of_files(tmp_path / "two.jsonl")
    before = fingerprints.of_files(tmp_path)
    (tmp_path / "two.jsonl").rename(tmp_path / "three.jsonl")
    assert fingerprints.of_files(tmp_path) != before


def test_what_was_hashed_is_not_read_again_until_it_changes(tmp_path, read):
    folder = model_folder(tmp_path / "a")
    settle()
    first = fingerprints.of_model(folder)
    assert sorted(read) == ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    read.clear()
    assert fingerprints.of_model(folder) == first and read == []
    (folder / "model.safetensors").write_text("abd")  # as long as before
    other = fingerprints.of_model(folder)
    assert other != first and read == ["model.safetensors"]
    (folder / "model.safetensors").write_text("abc")
    assert fingerprints.of_model(folder) == first
    (folder / "vocab.txt").write_text("more")
    settle()
    assert fingerprints.of_model(folder) not in (first, other)
    (folder / "vocab.txt").unlink()
    read.clear()
    assert fingerprints.of_model(folder) == first and "config.json" not in read


def test_a_change_in_the_instant_of_hashing_is_seen(tmp_path, read, monkeypatch):
    """The file system's clock ticks too slowly to tell two changes apart: times that are put back stand for it."""
    file = tmp_path / "train.jsonl"
    file.write_text("one")
    stamp = [*fingerprints._stamp(epath.Path(file))]
    monkeypatch.setattr(fingerprints, "_stamp", lambda file: stamp)
    first = fingerprints.of_files(file)
    file.write_text("two")
    assert fingerprints.of_files(file) != first and read == ["train.jsonl"] * 2


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, read, monkeypatch):
    file = tmp_path / "train.jsonl"
    file.write_text("one")
    settle()
    digest = fingerprints._digest

    def slow(path):
        found = digest(path)
        file.write_text("two")
        os.utime(file, ns=(0, 0))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(fingerprints, "_digest", slow)
        first = fingerprints.of_files(file)
    settle()
    assert fingerprints.of_files(file) != first


def test_times_put_back_are_seen_by_the_time_of_that(tmp_path, read):
    file = tmp_path / "train.jsonl"
    file.write_text("one")
    settle()
    before, first = file.stat(), fingerprints.of_files(file)
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert fingerprints.of_files(file) != first


def test_what_is_kept_changes_no_hash_and_is_no_data(tmp_path, read):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    settle()
    whole = fingerprints.of_files(tmp_path)
    fingerprints.of_files(tmp_path / "train.jsonl")
    kept = [path.name for path in tmp_path.iterdir() if path.name.endswith(fingerprints.KEPT)]
    assert set(kept) == {f".train.jsonl{fingerprints.KEPT}", fingerprints.KEPT}
    assert fingerprints.of_files(tmp_path) == whole


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": {}}', "\x00"])
def test_damaged_records_are_made_again(tmp_path, read, text):
    folder = model_folder(tmp_path / "a")
    settle()
    first = fingerprints.of_model(folder)
    (folder / fingerprints.KEPT).write_text(text)
    read.clear()
    assert fingerprints.of_model(folder) == first and len(read) == 4
    read.clear()
    assert fingerprints.of_model(folder) == first and read == []


def test_a_folder_that_is_read_only_stays_as_it_is(tmp_path, read, cache):
    folder = model_folder(tmp_path / "a")
    settle()
    folder.chmod(0o555)
    try:
        first = fingerprints.of_model(folder)
        names = sorted(path.name for path in folder.iterdir())
        read.clear()
        assert fingerprints.of_model(folder) == first and read == []
    finally:
        folder.chmod(0o755)
    assert names == ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert list((cache / "mpo_jax" / "hashes").iterdir())


def test_of_little_nothing_is_kept(tmp_path):
    folder = model_folder(tmp_path / "a")
    fingerprints.of_model(folder)
    assert not (folder / fingerprints.KEPT).exists()
