"""Encoded rows and meshes of virtual devices and of two processes enter; what each device gets is checked."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mpo_jax import sharding
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader, Prefetch
from mpo_jax.data.plan import FILLER
from mpo_jax.data.rows import FIELDS, prompt_slots, tight_rows
from mpo_jax.data.tokenizer import Conventions
from mpo_jax.errors import InputError
from tests.tools.processes import PATH

PAD = 2


def make_encoded(count=61, replies=2, seed=0) -> Encoded:
    random = np.random.default_rng(seed)
    lens = random.integers(1, 20, (count, 1 + replies))
    return Encoded(
        tokens=random.integers(0, 100, lens.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lens)]),
        id=np.arange(count, dtype=np.int32) + 1000,
        prompt_id=random.permutation(count).astype(np.int32),
        confidence=np.full(count, np.nan, np.float32),
        margin=np.full(count, np.nan, np.float32),
        label=np.full(count, np.nan, np.float32),
        replies=replies,
        conventions=Conventions(1, 2, PAD, False),
        counts={},
        key="",
    )


def _spanning_mesh(devices) -> Mesh:
    """data 4, tensor 2, where each pair along the tensor axis lies in the two halves (processes) of the devices."""
    array = np.array(devices).reshape(2, 4).T.reshape(4, 1, 2)
    return Mesh(array, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def test_rows_are_dealt_to_the_shards_in_turn():
    """So that no device has all the fillers of the last batch, nor all the long prompts."""
    encoded, mesh = make_encoded(count=21), sharding.make_mesh(4, 2, 1)
    plain, dealt = (Loader(encoded, 16, form="slots", mesh=mesh, shuffle=False, dealt=deal) for deal in (False, True))
    assert len(dealt.plan(0)) == len(plain.plan(0)) == 2
    for step in range(2):
        before, after = plain.rows(step)[1], dealt.rows(step)[1].reshape(8, 2)
        for shard in range(8):
            np.testing.assert_array_equal(after[shard], before[shard::8])
    real = (dealt.rows(1)[1].reshape(8, 2) != FILLER).sum(axis=1)
    assert real.sum() == 21 - 16 and real.max() == 1
    np.testing.assert_array_equal(np.asarray(dealt.batch(1).weight), dealt.rows(1)[1] != FILLER)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replies", [0, 1, 2])
def test_tight_rows_by_their_definition(replies):
    encoded = make_encoded(replies=replies)
    rows = tight_rows(encoded, np.array([3, FILLER, 0]), 64)
    for place, row in ((0, 3), (2, 0)):
        pieces = encoded.row(row)
        tokens = np.concatenate(pieces)
        segments = np.concatenate([np.full(len(piece), 1 + n) for n, piece in enumerate(pieces)])
        positions = [np.arange(len(pieces[0])), *(len(pieces[0]) + np.arange(len(piece)) for piece in pieces[1:])]
        end = len(tokens)
        assert (rows["tokens"][place, :end] == tokens).all() and (rows["tokens"][place, end:] == PAD).all()
        assert (rows["segments"][place, :end] == segments).all() and not rows["segments"][place, end:].any()
        assert (rows["positions"][place, :end] == np.concatenate(positions)).all()
    assert rows["weight"].tolist() == [1, 0, 1] and rows["id"].tolist() == [1003, -1, 1000]
    assert rows["prompt_id"].tolist() == [encoded.prompt_id[3], -1, encoded.prompt_id[0]]
    assert not rows["segments"][1].any() and {rows[name].dtype for name in FIELDS[:5]} == {np.dtype(np.int32)}


def test_prompt_slots_are_left_padded():
    encoded = make_encoded()
    rows = prompt_slots(encoded, np.array([5, FILLER]), 24)
    prompt = encoded.row(5)[0]
    start = 24 - len(prompt)
    assert (rows["tokens"][0, start:] == prompt).all() and (rows["tokens"][0, :start] == PAD).all()
    assert rows["segments"][0].tolist() == [0] * start + [1] * len(prompt)
    assert rows["positions"][0, start:].tolist() == list(range(len(prompt)))
    assert not rows["segments"][1].any() and rows["weight"].tolist() == [1, 0]


def test_window_covers_every_rows_responses():
    loader = Loader(make_encoded(), 8)
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        for segments in np.asarray(batch.segments):
            columns = np.flatnonzero(segments >= 2)
            assert not len(columns) or columns[-1] - columns[0] < batch.window


# Meshes ---------------------------------------------------------------------------------------------------------------


def _meshes():
    devices = jax.devices()[:8]
    make = sharding.make_mesh
    return [make(8, 1, 1, devices), make(2, 2, 2, devices), make(1, 8, 1, devices), _spanning_mesh(devices)]


@pytest.mark.parametrize("form", ["tight", "slots"])
def test_one_device_equals_eight(form):
    encoded = make_encoded()
    ref_logps = np.random.default_rng(1).normal(size=(61, 2)).astype(np.float32)
    one = Loader(encoded, 16, form=form, ref_logps=ref_logps)
    for mesh in _meshes():
        many = Loader(encoded, 16, form=form, mesh=mesh, ref_logps=ref_logps)
        assert many.buckets == one.buckets
        for step in range(one.steps_per_epoch):
            a, b = one.batch(step), many.batch(step)
            assert a.window == b.window and len(b.tokens.sharding.device_set) == 8
            assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (np.asarray(x) == np.asarray(y)).all(), a, b)))


def test_the_tensor_axis_repeats_rows_and_builds_them_once(monkeypatch):
    mesh = sharding.make_mesh(2, 2, 2, jax.devices()[:8])
    loader = Loader(make_encoded(), 16, mesh=mesh)
    built, build = [], loader._build
    monkeypatch.setattr(loader, "_build", lambda e, rows, length: built.append(len(rows)) or build(e, rows, length))
    batch = loader.batch(0)
    shards = {shard.device: shard for shard in batch.tokens.addressable_shards}
    for pair in mesh.devices.reshape(4, 2):
        assert shards[pair[0]].index == shards[pair[1]].index
        assert (np.asarray(shards[pair[0]].data) == np.asarray(shards[pair[1]].data)).all()
    assert built == [4, 4, 4, 4]


def test_the_global_batch_uses_every_row_once_with_zero_weight_fillers():
    encoded = make_encoded()
    loader = Loader(encoded, 16, mesh=_spanning_mesh(jax.devices()[:8]), shuffle=False)
    batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
    ids = np.concatenate([np.asarray(batch.id)[np.asarray(batch.weight) > 0] for batch in batches])
    assert sorted(ids.tolist()) == encoded.id.tolist()
    for batch in batches:
        filler = np.asarray(batch.weight) == 0
        assert not np.asarray(batch.segments)[filler].any() and (np.asarray(batch.id)[filler] == -1).all()
    assert sum(loader.real_tokens(step) for step in range(loader.steps_per_epoch)) == len(encoded.tokens)


def test_a_training_batch_holds_real_rows_only_and_says_how_many():
    loader = Loader(make_encoded(61), 16)
    assert loader.steps_per_epoch == 4
    for step in range(3 * loader.steps_per_epoch):
        batch = loader.batch(step)
        assert (np.asarray(batch.weight) == 1).all() and loader.real_rows(step) == 16
    few = Loader(make_encoded(5), 16)
    assert few.steps_per_epoch == 1 and few.real_rows(0) == 5 and (np.asarray(few.batch(0).weight) == 1).all()
    scored = Loader(make_encoded(61), 16, shuffle=False)
    assert [scored.real_rows(step) for step in range(4)] == [16, 16, 16, 13]


def test_a_sample_has_the_loaders_shapes_and_is_the_same_every_time():
    encoded = make_encoded(61)
    loader = Loader(encoded, 8, shuffle=False, seed=1)
    shapes = {(shape.tokens.shape, shape.window) for shape in loader.shapes()}
    found = []
    for each in (loader, loader, Loader(encoded, 8, shuffle=False, seed=2)):
        with each.sample(3) as stream:
            batches = list(stream)
        assert len(batches) == 3 and {(batch.tokens.shape, batch.window) for batch in batches} <= shapes
        found.append(np.concatenate([np.asarray(batch.id) for batch in batches]).tolist())
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 24
    with loader.sample(100) as stream:
        every = np.concatenate([np.asarray(batch.id)[np.asarray(batch.weight) > 0] for batch in stream])
    assert sorted(every.tolist()) == encoded.id.tolist()


def test_shapes_are_what_batches_are():
    loader = Loader(make_encoded(), 16, mesh=sharding.make_mesh(4, 2, 1, jax.devices()[:8]))
    promised = {(shape.tokens.shape, shape.window): shape for shape in loader.shapes()}
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        shape = promised[batch.tokens.shape, batch.window]
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), batch, shape)
        assert all(jax.tree.leaves(same))
        assert loader.shapes([step, step]) == [shape]
    of_all = loader.shapes(range(3 * loader.steps_per_epoch))
    assert len(of_all) == len(promised) and all(shape in of_all for shape in promised.values())


def test_shapes_of_a_sample_are_those_of_its_batches():
    loader = Loader(make_encoded(61), 8, shuffle=False, max_buckets=8)
    with loader.sample(2) as stream:
        found = {(batch.tokens.shape, batch.window) for batch in stream}
    assert {(shape.tokens.shape, shape.window) for shape in loader.sampled_shapes(2)} == found
    assert len(found) < len(loader.buckets)


def test_one_trace_per_bucket():
    loader = Loader(make_encoded(), 8)
    traces = []

    @jax.jit
    def total(batch):
        traces.append(batch.tokens.shape)
        return (batch.tokens * batch.weight[:, None]).sum()

    for step in range(2 * loader.steps_per_epoch):
        total(loader.batch(step))
    assert len(traces) == len(loader.buckets) <= 8


def test_a_mesh_that_does_not_divide_the_batch():
    with pytest.raises(InputError, match=r"batch_size 12 is not divided by the mesh's data x fsdp = 8"):
        Loader(make_encoded(), 12, mesh=sharding.make_mesh(4, 2, 1, jax.devices()[:8]))


# Order and threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 23, 24])
def test_a_run_resumed_at_any_step_sees_what_the_whole_run_saw(start):
    def seen(first):
        with Loader(make_encoded(), 8, seed=5).batches(first, 25) as run:  # three epochs and a step
            return [(batch.window, np.asarray(batch.id).tolist()) for batch in run]

    assert seen(0)[start:] == seen(start)


def test_any_step_is_reached_from_its_number_alone():
    loader = Loader(make_encoded(), 8, seed=5)
    steps = 2 * loader.steps_per_epoch + 3
    with loader.batches(0, steps) as run:
        whole = [np.asarray(batch.id) for batch in run]
    resumed = Loader(make_encoded(), 8, seed=5)
    start = loader.steps_per_epoch + 2
    with resumed.batches(start, steps) as run:
        rest = [np.asarray(batch.id) for batch in run]
    assert len(whole) == steps and all((a == b).all() for a, b in zip(whole[start:], rest, strict=True))
    assert not (whole[0] == Loader(make_encoded(), 8, seed=6).batch(0).id).all()


def test_prefetch_raises_the_threads_error_and_shuts_down():
    def broken():
        yield 1
        raise InputError("damaged row")

    items = Prefetch(broken)
    assert next(items) == 1
    with pytest.raises(InputError, match="damaged row"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    with Loader(make_encoded(), 8).batches() as endless:
        next(endless)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    endless.close()
    with pytest.raises(StopIteration):
        next(endless)


def test_prefetch_is_bounded():
    made, taken = [], threading.Event()

    def count():
        for number in range(100):
            made.append(number)
            if number == 3:
                taken.set()
            yield number

    with Prefetch(count, ahead=2) as items:
        assert next(items) == 0
        assert taken.wait(10)  # one taken, two queued, one in hand
        assert len(made) <= 4


# Two processes --------------------------------------------------------------------------------------------------------


def test_two_processes_hold_the_same_plan_and_make_one_global_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = PATH
    children = [
        subprocess.Popen([sys.executable, __file__, str(index), str(port), str(tmp_path)], env=env) for index in (0, 1)
    ]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    found = [np.load(tmp_path / f"{index}.npz") for index in (0, 1)]
    assert (found[0]["plan"] == found[1]["plan"]).all()
    one = Loader(make_encoded(), 16)
    assert (found[0]["plan"] == np.stack([one.rows(step)[1] for step in range(2 * one.steps_per_epoch)])).all()
    for step in range(one.steps_per_epoch):
        expected = np.asarray(one.batch(step).tokens)
        for name, rows in (("split", 8), ("spanning", 16)):
            seen = np.zeros(16, int)
            for process in found:
                blocks = [process[f"{name}_{step}_{device}"] for device in range(4)]
                starts = process[f"{name}_{step}_starts"]
                mine = np.zeros(16, int)
                for start, block in zip(starts, blocks, strict=True):
                    assert (block == expected[start : start + len(block)]).all()
                    mine[start : start + len(block)] = 1
                # a process builds what its devices address, no more
                assert mine.sum() == rows == process[f"{name}_{step}_built"]
                seen += mine
            assert (seen == (1 if name == "split" else 2)).all()


def _child(index: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index, initialization_timeout=60)
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    meshes = {"split": sharding.make_mesh(2, 2, 2, devices), "spanning": _spanning_mesh(devices)}
    result = {}
    for name, mesh in meshes.items():
        loader = Loader(make_encoded(), 16, mesh=mesh)
        build, built = loader._build, []
        loader._build = lambda e, rows, length, built=built, build=build: (
            built.append(len(rows)) or build(e, rows, length)
        )
        result["plan"] = np.stack([loader.rows(step)[1] for step in range(2 * loader.steps_per_epoch)])
        with loader.batches(0, loader.steps_per_epoch, ahead=1) as batches:
            arrays = [batch.tokens for batch in batches]
        for step, array in enumerate(arrays):
            built.clear()
            loader.batch(step)
            result[f"{name}_{step}_built"] = sum(built)
            result[f"{name}_{step}_starts"] = [shard.index[0].start or 0 for shard in array.addressable_shards]
            for place, shard in enumerate(array.addressable_shards):
                result[f"{name}_{step}_{place}"] = np.asarray(shard.data)
    np.savez(Path(folder) / f"{index}.npz", **result)
    jax.distributed.shutdown()


if __name__ == "__main__":
    _child(int(sys.argv[1]), sys.argv[2], sys.argv[3])
