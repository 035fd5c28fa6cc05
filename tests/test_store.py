"""Copies of what lies in an object store, against the fake one on loopback: fetched once, resumed, sent whole."""

import threading
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, database, store
from mpo_jax.data import encode as encoding
from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.schemas import TextRecord
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.evaluation.annotation import Judgement, Store
from mpo_jax.evaluation.judge_cache import Cache


def folder(gcs, name: str) -> epath.Path:
    gcs.put(f"{name}/one", b"1" * 1000)
    gcs.put(f"{name}/two.txt", b"2")
    gcs.put(f"{name}/deep/three", b"")
    return epath.Path(f"gs://bucket/{name}")


def files(place: Path) -> dict[str, bytes]:
    found = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.split("/")[-1].startswith(".")}


WHOLE = {"one": b"1" * 1000, "two.txt": b"2", "deep/three": b""}


def test_a_path_of_a_file_system_is_its_own_copy(tmp_path):
    assert store.local(tmp_path) == store.fetch(tmp_path) == tmp_path
    assert store.is_fetched(tmp_path) and not store.is_fetched(tmp_path / "nothing")
    store.send(tmp_path)
    assert store.holds_databases(tmp_path) and not store.holds_databases("gs://bucket/x")


def test_a_mounted_object_store_holds_no_database(tmp_path, monkeypatch):
    mounts = f"overlay / overlay rw 0 0\nbucket {tmp_path}/my\\040bucket fuse.gcsfuse rw 0 0\n"
    monkeypatch.setattr(store, "Path", lambda name: pretended if name == "/proc/self/mounts" else Path(name))
    pretended = tmp_path / "mounts"
    pretended.write_text(mounts)
    assert not store.holds_databases(tmp_path / "my bucket" / "run" / "judge.sqlite")
    assert store.holds_databases(tmp_path / "my bucket too")


def test_a_folder_is_fetched_once_and_again_where_it_has_changed(gcs, tmp_path):
    place = folder(gcs, "fetched")
    assert not store.is_fetched(place)
    found = store.fetch(place)
    assert found == tmp_path / "scratch" / "gs" / "bucket" / "fetched" and files(found) == WHOLE
    assert store.is_fetched(place)
    times = {path: path.stat().st_ino for path in found.rglob("*") if path.is_file()}
    store.fetch(place)
    assert {path: path.stat().st_ino for path in found.rglob("*") if path.is_file()} == times
    gcs.put("fetched/one", b"another")
    (place / "two.txt").unlink()
    assert not store.is_fetched(place)
    assert files(store.fetch(place)) == {"one": b"another", "deep/three": b""}
    with pytest.raises(InputError, match=r"^gs://bucket/nothing: not found$"):
        store.fetch("gs://bucket/nothing")
    with pytest.raises(InputError, match=r"without '\.\.'"):
        store.fetch("gs://bucket/../../etc")


def test_only_what_is_wanted_is_fetched(gcs):
    place = folder(gcs, "wanted")
    assert files(store.fetch(place, lambda name: name.endswith(".txt"))) == {"two.txt": b"2"}


def test_a_fetch_that_was_cut_off_goes_on_behind_the_last_whole_file(gcs, monkeypatch):
    place = folder(gcs, "cut")
    whole = store.shutil.copyfileobj

    def cut(source, target, size):
        if target.name.endswith(".one.part"):
            target.write(b"1" * 10)
        else:
            whole(source, target, size)

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "copyfileobj", cut)
        with pytest.raises(InputError, match=r"^gs://bucket/cut/one: 10 of 1000 bytes arrived; run the same command"):
            store.fetch(place)
    assert set(files(store.local(place))) == {"two.txt", "deep/three"} and not store.is_fetched(place)
    first = (store.local(place) / "two.txt").stat().st_ino
    assert files(store.fetch(place)) == WHOLE and (store.local(place) / "two.txt").stat().st_ino == first


def test_failures_of_the_store_are_tried_again(gcs):
    gcs.fail_every = 5
    before = gcs.failed
    place = folder(gcs, "failing")
    assert files(store.fetch(place)) == WHOLE
    artifacts.write_json(place / "value.json", {"a": 1})
    assert artifacts.read_json(place / "value.json") == {"a": 1}
    weights = {"params": {"kernel": np.arange(64, dtype=np.float32)}}
    checkpoint.save_weights(place / "weights", weights)
    assert gcs.failed > before + 5


def test_one_process_of_a_host_fetches_at_a_time(tmp_path):
    order: list[str] = []
    with store.locked(tmp_path / "folder"):
        other = threading.Thread(target=lambda: _locked(tmp_path / "folder", order))
        other.start()
        other.join(0.3)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def _locked(place: Path, order: list[str]) -> None:
    with store.locked(place):
        order.append("second")


def test_what_is_sent_last_makes_a_folder_whole(gcs, monkeypatch):
    place = epath.Path("gs://bucket/sent")
    copy = store.local(place)
    for name in ("a", "manifest.json", "z"):
        artifacts.write_text(copy / name, name)
    sent: list[str] = []
    put = gcs.bucket.put
    monkeypatch.setattr(gcs.bucket, "put", lambda name, *rest: (sent.append(name), put(name, *rest))[1])
    store.send(place, last="manifest.json")
    assert sorted(sent) == ["sent/a", "sent/manifest.json", "sent/z"] and sent[-1] == "sent/manifest.json"
    assert store.is_fetched(place)  # the sender's copy is up to date
    store.remove(place)
    assert gcs.names("sent/") == [] and not copy.exists()
    store.remove(place)


@pytest.mark.parametrize("remote", [False, True])
def test_a_move_that_was_killed_is_done_again(gcs, tmp_path, monkeypatch, remote):
    root = epath.Path("gs://bucket/moved" if remote else tmp_path)
    for name in ("deep/weights", "inputs.json", "z"):
        (root / "stage" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "stage" / name).write_text(name)
    kind, method = type(root), "unlink" if remote else "replace"
    whole, calls = getattr(kind, method), []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, killed)
        with pytest.raises(KeyboardInterrupt):
            store.move(root / "stage", root / "aside" / "first", "inputs.json")
    assert (root / "stage" / "inputs.json").exists()
    store.move(root / "stage", root / "aside" / "second", "inputs.json")
    assert not (root / "stage").exists()
    assert (root / "aside" / "second" / "inputs.json").read_text() == "inputs.json"
    assert (root / "aside" / "first" / "deep" / "weights").read_text() == "deep/weights"


def test_encoded_rows_are_mapped_from_a_copy_and_fetched_where_it_is_missing(gcs, stories, monkeypatch):
    records = [
        TextRecord(id=number, split="train", prompt=f"Once {number}", chosen=" a time.", rejected=" no.")
        for number in range(9)
    ]
    loaded, cache = load_tokenizer(str(stories)), epath.Path("gs://bucket/rows")
    made = encode(records, loaded, 2, Limits(64, 16), cache)
    assert isinstance(made.tokens, np.memmap)
    (manifest,) = [name for name in gcs.names("rows/") if name.endswith("manifest.json")]
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_encode", lambda *_: pytest.fail("it is kept"))
        for gone in (True, False):
            if gone:
                store.shutil.rmtree(store.local(cache))
            again = encode(records, loaded, 2, Limits(64, 16), cache)
            np.testing.assert_array_equal(again.tokens, made.tokens)
    gcs.bucket.delete(manifest, {})
    assert (encode(records, loaded, 2, Limits(64, 16), cache).tokens == made.tokens).all()


# Databases ------------------------------------------------------------------------------------------------------------


def answers(cache: Cache) -> dict[str, str | None]:
    return {key: cache.get(key) for key in ("a", "b", "c", "d")}


def put(cache: Cache, key: str) -> None:
    cache.charge_call("run")
    cache.put("run", key, "model", key.upper(), 1, 1)


def test_answers_lie_in_the_store_when_the_stage_ends_and_from_time_to_time(gcs, monkeypatch):
    path = epath.Path("gs://bucket/judge/judge.sqlite")
    with Cache(path) as cache:
        sent = gcs.content("judge/judge.sqlite")
        put(cache, "a")
        assert gcs.content("judge/judge.sqlite") == sent
        with monkeypatch.context() as patch:
            patch.setattr(database, "SECONDS", 0.0)
            put(cache, "b")
        assert gcs.content("judge/judge.sqlite") != sent
        put(cache, "c")
    store.shutil.rmtree(store.scratch())  # another host
    with Cache(path) as cache:
        assert answers(cache) == {"a": "A", "b": "B", "c": "C", "d": None} and cache.spent("run") == (3, 6)


def test_a_process_that_is_killed_loses_no_answer_that_its_host_keeps(gcs):
    path = epath.Path("gs://bucket/killed/judge.sqlite")
    cache = Cache(path)
    put(cache, "a")  # and is never closed
    with Cache(path) as again:
        assert answers(again)["a"] == "A"
    put(cache, "b")
    store.copy_of(path).parent.rename(store.copy_of(path).parent.with_name("lost"))  # the host goes on elsewhere
    with Cache(path) as elsewhere:
        assert answers(elsewhere) == {"a": "A", "b": None, "c": None, "d": None}
        put(elsewhere, "c")
    store.shutil.rmtree(store.copy_of(path).parent)
    store.copy_of(path).parent.with_name("lost").rename(store.copy_of(path).parent)
    with Cache(path) as both:
        assert answers(both) == {"a": "A", "b": "B", "c": "C", "d": None}


def test_a_workdir_that_was_deleted_leaves_no_answers_in_scratch(gcs):
    path = epath.Path("gs://bucket/deleted/judge.sqlite")
    with Cache(path) as cache:
        put(cache, "a")
    path.unlink()
    with Cache(path) as cache:
        assert answers(cache)["a"] is None and cache.spent("run") == (0, 0)


def test_a_file_that_is_no_database_is_told(gcs):
    gcs.put("broken/judge.sqlite", b"no database at all, but long enough to be one" * 9)
    with pytest.raises(InputError, match=r"^gs://bucket/broken/judge.sqlite: no database that this version reads"):
        Cache(epath.Path("gs://bucket/broken/judge.sqlite"))


def test_the_later_judgement_counts(gcs):
    def judgement(choice: str, at: str, item: str = "one") -> Judgement:
        return Judgement("me", item, 1, "sft", "mpo", "sft", choice, "", 1.0, at)

    path = epath.Path("gs://bucket/people/annotations.sqlite")
    here = Store(path)
    here.put(judgement("sft", "2026-01-01"))
    here.put(judgement("sft", "2026-01-03", "two"))
    away = store.copy_of(path).parent
    away.rename(away.with_name("away"))
    with Store(path) as other:
        other.put(judgement("mpo", "2026-01-02"))
        other.put(judgement("mpo", "2026-01-02", "two"))
    store.shutil.rmtree(away)
    away.with_name("away").rename(away)
    with Store(path) as both:
        assert {each.item: each.choice for each in both.all()} == {"one": "mpo", "two": "sft"}
