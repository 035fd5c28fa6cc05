"""Checkpoints: equal bits on other meshes, other vocabulary padding, a process killed while it saves, hashes, JSON."""

import os
import signal
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
from jax.sharding import NamedSharding, PartitionSpec

from mpo_jax import artifacts, checkpoint, optim, sharding
from mpo_jax.checkpoint import Checkpoints
from mpo_jax.errors import InputError
from mpo_jax.types import TrainState

SHAPES = {
    "params": {
        "embed": {"embedding": (512, 16)},
        "lm_head": {"kernel": (512, 16)},
        "final_norm": {"scale": (16,)},
        "layers": {"mlp": {"up": {"kernel": (2, 16, 32)}}},
    },
    "head": {"kernel": (16, 1)},
}
OPTIMIZER = optim.make_optimizer(1e-3, weight_decay=0.1, clip_norm=1.0, moments="bfloat16")


def weights(vocab: int = 512):
    """Numbers that differ everywhere; the vocabulary's rows beyond 300 are padding."""
    shapes = jax.tree.map(lambda s: (vocab, *s[1:]) if s[0] == 512 else s, SHAPES, is_leaf=lambda s: type(s) is tuple)
    return jax.tree.map(
        lambda s: jnp.sin(jnp.arange(np.prod(s), dtype=jnp.float32) + s[-1]).reshape(s),
        shapes,
        is_leaf=lambda s: type(s) is tuple,
    )


def mesh_of(devices: int):
    return sharding.make_mesh(1, max(1, devices // 2), min(2, devices), devices=jax.devices()[:devices])


def trained(devices: int, vocab: int = 512) -> TrainState:
    """A state two optimizer steps from its start, sharded over `devices`."""
    mesh = mesh_of(devices)
    params = weights(vocab)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    opt_state = jax.jit(OPTIMIZER.init, out_shardings=optim.state_shardings(OPTIMIZER, params, mesh))(params)
    for _ in range(2):
        updates, opt_state = jax.jit(OPTIMIZER.update)(jax.tree.map(jnp.cos, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    key, extra = jax.device_put((jax.random.key(7), {"kl": jnp.float32(0.05)}), sharding.replicated(mesh))
    return TrainState(jax.device_put(jnp.int32(2), sharding.replicated(mesh)), params, opt_state, key, extra)


def abstract(devices: int, vocab: int = 512) -> TrainState:
    """Shapes, dtypes and shardings alone."""
    mesh = mesh_of(devices)
    params = jax.eval_shape(lambda: weights(vocab))
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params,
        sharding.tree_shardings(params, mesh),
    )
    opt_state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(OPTIMIZER.init, params),
        optim.state_shardings(OPTIMIZER, params, mesh),
    )

    def scalar(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))

    key = scalar(jax.eval_shape(lambda: jax.random.key(0)))
    number = scalar(jnp.float32(0))
    return TrainState(scalar(jnp.int32(0)), params, opt_state, key, {"kl": number})


def bits(tree) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint._without_keys(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    state = trained(8)
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, state, {"best": {"loss": 0.5}, "epoch": 1})
    checkpoints.close()
    checkpoint.save_weights(folder / "weights", state.params)
    return folder, state


@pytest.mark.parametrize("devices", [8, 4, 1])
def test_a_state_of_8_devices_restores_bit_for_bit(saved, devices):
    folder, state = saved
    like = abstract(devices)
    checkpoints = Checkpoints(folder)
    found, extra = checkpoints.restore(checkpoints.latest_step(), like)
    checkpoints.close()
    assert bits(found) == bits(state)
    assert extra == {"best": {"loss": 0.5}, "epoch": 1}
    jax.tree.map(lambda x, want: None if x.sharding == want.sharding else pytest.fail(str(x.sharding)), found, like)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert found.opt_state[1].mu["head"]["kernel"].dtype == jnp.bfloat16
    drawn = jax.random.uniform(found.key, (3,))  # a typed key again, and the same one
    np.testing.assert_array_equal(drawn, jax.random.uniform(state.key, (3,)))


def test_4_devices_go_on_with_8s_numbers(saved, tmp_path):
    """8 -> 4 -> 1: a state that moves twice is the state."""
    folder, state = saved
    first = Checkpoints(folder)
    moved, extra = first.restore(2, abstract(4))
    first.close()
    second = Checkpoints(tmp_path)
    second.save(2, moved, extra)
    again, _ = second.restore(2, abstract(1))
    second.close()
    assert bits(again) == bits(state)


@pytest.mark.parametrize(("devices", "vocab"), [(4, 384), (1, 320), (8, 768)])
def test_another_vocabulary_padding(saved, devices, vocab):
    folder, state = saved
    checkpoints = Checkpoints(folder)
    found, _ = checkpoints.restore(2, abstract(devices, vocab))
    checkpoints.close()
    both = min(vocab, 512)

    def compare(path, new, old):
        new, old = np.asarray(new, np.float32), np.asarray(old, np.float32)
        if any(name in jax.tree_util.keystr(path) for name in ("embed", "lm_head")):
            assert new.shape == (vocab, *old.shape[1:])
            assert not new[both:].any()
            new, old = new[:both], old[:both]
        np.testing.assert_array_equal(new, old)

    jax.tree_util.tree_map_with_path(compare, (found.params, found.opt_state), (state.params, state.opt_state))
    alone = checkpoint.restore_weights(folder / "weights", abstract(devices, vocab).params)
    assert bits(alone) == bits(found.params)


def test_only_the_vocabulary_may_differ(saved):
    folder, _ = saved
    wider = jax.tree.map(lambda x: x, abstract(1).params)
    head = wider["head"]["kernel"]
    wider["head"]["kernel"] = jax.ShapeDtypeStruct((17, 1), head.dtype, sharding=head.sharding)
    with pytest.raises(InputError, match=r"head/kernel has shape \(16, 1\); expected \(17, 1\)"):
        checkpoint.restore_weights(folder / "weights", wider)
    wider = jax.tree.map(lambda x: x, abstract(1).params)
    table = wider["params"]["embed"]["embedding"]
    wider["params"]["embed"]["embedding"] = jax.ShapeDtypeStruct((512, 8), table.dtype, sharding=table.sharding)
    with pytest.raises(InputError, match=r"params/embed/embedding has shape \(512, 16\); expected \(512, 8\)"):
        checkpoint.restore_weights(folder / "weights", wider)


def test_missing_and_surplus_leaves_are_named(saved):
    folder, _ = saved
    without = {name: tree for name, tree in abstract(1).params.items() if name != "head"}
    with pytest.raises(InputError, match="head/kernel is in the checkpoint, but is not expected"):
        checkpoint.restore_weights(folder / "weights", without)
    surplus = abstract(1).params | {"lora": {"a": abstract(1).params["head"]["kernel"]}}
    with pytest.raises(InputError, match="lora/a is expected, but not in the checkpoint"):
        checkpoint.restore_weights(folder / "weights", surplus)
    with pytest.raises(InputError, match="not found"):
        checkpoint.restore_weights(folder / "nowhere", surplus)
    checkpoints = Checkpoints(folder)
    with pytest.raises(InputError, match=r"not found; complete are the steps \[2\]"):
        checkpoints.restore(3, abstract(1))
    checkpoints.close()


def test_weights_restore_in_another_dtype_and_replace_those_before(tmp_path):
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), abstract(4).params["head"]
    )
    for factor in (1, 2):
        head = jax.tree.map(lambda x, factor=factor: factor * x, weights()["head"])
        checkpoint.save_weights(tmp_path / "weights", head)
    found = checkpoint.restore_weights(tmp_path / "weights", like)
    np.testing.assert_array_equal(found["kernel"], (2 * weights()["head"]["kernel"]).astype(jnp.bfloat16))


def tiny(step: int) -> TrainState:
    one = NamedSharding(mesh_of(1), PartitionSpec())
    tree = TrainState(jnp.int32(step), {"w": jnp.full((4,), step, jnp.float32)}, (), jax.random.key(step))
    return jax.device_put(tree, one)


def test_the_last_k_and_the_best_are_kept_apart(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False)):
        if best:
            checkpoints.save_best(step, tiny(step).params)
        checkpoints.save(step, tiny(step), {"best_step": 1 if step < 3 else 3})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "last").iterdir() if p.name.isdigit()) == ["4", "5"]
    assert [p.name for p in (tmp_path / "best").iterdir() if p.name.isdigit()] == ["3"]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 5
    np.testing.assert_array_equal(checkpoints.restore_best(3, tiny(0).params)["w"], np.full(4, 3.0))
    with pytest.raises(ValueError, match="step 5 is not after the latest checkpoint, 5"):
        checkpoints.save(5, tiny(5), {})
    checkpoints.close()


def test_the_best_that_a_state_names_outlives_later_ones_until_the_next_state(tmp_path):
    """Killed after bests 30 and 40, with the last state at 20, whose best is 10: 10 must be there, 30 and 40 gone."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save_best(10, tiny(10).params)
    checkpoints.save(20, tiny(20), {"best_step": 10})
    checkpoints.save_best(30, tiny(30).params)
    checkpoints.save_best(40, tiny(40).params)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    np.testing.assert_array_equal(again.restore_best(10, tiny(0).params)["w"], np.full(4, 10.0))
    with pytest.raises(InputError, match=r"30.*not found"):
        again.restore_best(30, tiny(0).params)
    again.save_best(30, tiny(31).params)
    again.save_best(30, tiny(32).params)  # the same step again: replaced
    again.save(40, tiny(40), {"best_step": 30})
    again.save(50, tiny(50), {"best_step": 30})
    again.close()
    assert [p.name for p in (tmp_path / "best").iterdir() if p.name.isdigit()] == ["30"]
    again = Checkpoints(tmp_path)
    np.testing.assert_array_equal(again.restore_best(30, tiny(0).params)["w"], np.full(4, 32.0))
    again.close()


def test_what_a_kill_left_is_gone_once_the_folder_is_open_and_no_thread_removes_it_later(tmp_path):
    """A thread that removed it meanwhile met the steps that were being deleted: `save_best` failed in rare runs."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tiny(1), {})
    checkpoints.close()
    half = [tmp_path / kind / "7" / "params" / "ocdbt.process_0" / "d" for kind in ("last", "best")]
    for place in half:
        place.mkdir(parents=True)
    threads = set(threading.enumerate())
    with Checkpoints(tmp_path) as again:
        assert again.latest_step() == 1
        assert not any((tmp_path / kind / "7").exists() for kind in ("last", "best"))
        assert not [t for t in set(threading.enumerate()) - threads if "_SignalingThread" in type(t).__name__]


def poll(call) -> None:
    for _ in range(3000):
        call()
        time.sleep(0.01)


@pytest.mark.parametrize("call", ["check", "save", "close"])
def test_an_error_in_the_background_is_raised_at_the_next_call(tmp_path, monkeypatch, call):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tiny(1), {})
    checkpoints.wait()
    checkpoints.check()

    async def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("orbax.checkpoint.JsonCheckpointHandler._save_fn", full)
    checkpoints.save(2, tiny(2), {})
    calls = {
        "check": lambda: poll(checkpoints.check),
        "save": lambda: checkpoints.save(3, tiny(3), {}),
        "close": checkpoints.close,
    }
    with pytest.raises(OSError, match="disk full"):
        calls[call]()
    checkpoints.close()
    assert Checkpoints(tmp_path).latest_step() == 1


def abandon(folder) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, tiny(1), {})
    large = TrainState(jnp.int32(2), {"w": np.full((1 << 23,), 2, np.float32)}, (), jax.random.key(0))
    checkpoints.save(2, large, {})
    raise KeyboardInterrupt


def test_opened_again_after_a_loop_that_failed_without_closing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        abandon(tmp_path)
    again = Checkpoints(tmp_path)  # while the save of step 2 is on its way
    assert again.latest_step() == 2
    again.save(3, tiny(3), {})
    again.close()
    assert sorted(p.name for p in (tmp_path / "last").iterdir() if p.name[0].isdigit()) == ["2", "3"]


def save_one_and(folder, error) -> None:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tiny(1), {})
        if error is not None:
            raise error


def test_as_context_manager_it_finishes_its_save(tmp_path):
    save_one_and(tmp_path / "fine", None)
    with pytest.raises(KeyError):
        save_one_and(tmp_path / "failing", KeyError())
    for name in ("fine", "failing"):
        with Checkpoints(tmp_path / name) as checkpoints:
            assert checkpoints.latest_step() == 1


KILLED = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from pathlib import Path
from mpo_jax.checkpoint import Checkpoints
from mpo_jax.types import TrainState

folder, when = Path(sys.argv[1]), sys.argv[2]
state = lambda step: TrainState(jnp.int32(step), {"w": jnp.full((1 << 24,), step, jnp.float32)}, (), jax.random.key(0))
checkpoints = Checkpoints(folder)
checkpoints.save(1, state(1), {"at": 1})
checkpoints.wait()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_sight():
    while not any(path.is_file() for path in (folder / "last").glob("2*/**/*")):
        pass
    die()

if when == "written":
    threading.Thread(target=die_at_sight).start()
checkpoints.save(2, state(2), {"at": 2})
if when == "begun":
    while not any((folder / "last").glob("2*")):  # save returns before the folder is there
        pass
    die()
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["begun", "written"])
def test_killed_while_saving(tmp_path, when):
    """SIGKILL between save's return and completion, and at the first file of the save: the state before is there."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = Path(checkpoint.__file__).resolve().parent.parent
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), when], cwd=root, env=environment, capture_output=True, timeout=120
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert any(path.name.startswith("2") for path in (tmp_path / "last").iterdir()), "killed before the save began"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)

    shapes = jax.tree.map(
        like, TrainState(jnp.int32(0), {"w": jax.ShapeDtypeStruct((1 << 24,), jnp.float32)}, (), jax.random.key(0))
    )
    state, extra = checkpoints.restore(1, shapes)
    assert extra == {"at": 1}
    assert (np.asarray(state.params["w"]) == 1).all()
    checkpoints.save(2, state, {"at": "again"})  # what the kill left behind is no obstacle
    checkpoints.wait()
    assert checkpoints.restore(2, shapes)[1] == {"at": "again"}
    checkpoints.close()
    names = {path.name for path in (tmp_path / "last").iterdir()}
    assert {name for name in names if name[0].isdigit()} == {"1", "2"}, "what the kill left behind is removed"


def test_manifest_round_trip(tmp_path):
    assert artifacts.read_manifest(tmp_path) is None
    manifest = {
        "path": tmp_path,
        "loss": np.float32(0.5),
        "steps": jnp.int32(3),
        "worst": float("nan"),
        "list": (1, None, True),
        "inputs": {"sft": "ab12"},
    }
    artifacts.write_manifest(tmp_path / "new", manifest)
    found = artifacts.read_manifest(tmp_path / "new")
    assert found == manifest | {"path": str(tmp_path), "worst": "nan", "list": [1, None, True], "files": {}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["manifest.json"]
    with pytest.raises(TypeError):
        artifacts.write_manifest(tmp_path / "new", {"object": object()})
    assert artifacts.read_manifest(tmp_path / "new") == found


def test_a_kill_between_writing_and_renaming_leaves_the_manifest_before(tmp_path, monkeypatch):
    artifacts.write_manifest(tmp_path, {"run": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        artifacts.write_manifest(tmp_path, {"run": 2})
    assert artifacts.read_manifest(tmp_path)["run"] == 1


@pytest.mark.parametrize(
    ("text", "found"), [('{"a": ', "not valid JSON"), ("[1]", "not a file that this package writes")]
)
def test_a_broken_manifest_is_named(tmp_path, text, found):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=rf"manifest\.json: {found}"):
        artifacts.read_manifest(tmp_path)


def test_relative_folders(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = trained(1)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
    checkpoint.save_weights("run/weights", state.params)
    again = checkpoint.restore_weights("run/weights", state.params)
    jax.tree.map(np.testing.assert_array_equal, again, state.params)
    with Checkpoints("run/checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 1


def test_steps_that_an_earlier_version_made_whole_by_renaming_are_read(tmp_path):
    weights = {"params": {"kernel": jnp.arange(8.0)}}
    state = TrainState(jnp.int32(0), weights, {}, jax.random.key(0), {})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"at": 1})
    for mark in [*tmp_path.rglob("marked"), *tmp_path.rglob("commit_success.txt")]:
        mark.unlink()
    with Checkpoints(tmp_path) as again:
        assert again.latest_step() == 1 and again.restore(1, state)[1] == {"at": 1}
        again.save(2, state, {"at": 2})
    (tmp_path / "last" / "2" / "commit_success.txt").unlink()  # as a kill leaves it
    with Checkpoints(tmp_path) as again:
        assert again.latest_step() == 1


def test_a_first_save_that_was_killed_in_an_object_store_is_begun_again(gcs):
    """Its step is removed, and with it the folder, which no other object held."""
    gcs.put("killed_first/last/1/state/manifest.ocdbt", b"half of it")
    gcs.put("killed_first/best/1/_CHECKPOINT_METADATA", b"{}")
    for _ in range(2):
        with Checkpoints("gs://bucket/killed_first") as checkpoints:
            assert checkpoints.latest_step() is None
    assert gcs.names("killed_first/") == ["killed_first/best/marked", "killed_first/last/marked"]
