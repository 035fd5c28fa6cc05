"""Steps of a training, and batches of a scoring, are recorded; the trace is read again, and its table counted."""

import csv
import io
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, profiling, sharding
from mpo_jax.data.loader import Loader
from mpo_jax.errors import InputError
from mpo_jax.profiling import Operation, Wanted, operations, parse
from mpo_jax.stages import shards

LOOPS = 5


@jax.jit
def product(x):
    """A loop of matrix products, which a compiler can't leave out."""
    return jax.lax.fori_loop(0, LOOPS, lambda _, y: jnp.tanh(y @ x), x)


def record(folder, first, count, steps=4, training=True):
    x = jnp.full((64, 64), 0.01)
    jax.block_until_ready(product(x))
    wanted = Wanted("dpo", first, count)
    with profiling.of_stage(wanted, "dpo", epath.Path(folder), training):
        y = x
        for step in range(1, steps + 1):
            if training:
                profiling.begin(step, y)
                y = product(y)
                profiling.end(step, y)
            else:
                with profiling.batch([]):
                    y = jax.block_until_ready(product(y))


def steps_in(folder) -> list[int]:
    """The steps that a trace in a folder is annotated with, by JAX's own reader."""
    (file,) = (folder / artifacts.PROFILE).rglob(profiling.TRACE)
    trace = jax.profiler.ProfileData.from_serialized_xspace(file.read_bytes())
    events = [event for plane in trace.planes for line in plane.lines for event in line.events]
    return [dict(event.stats)["step_num"] for event in events if event.name == "dpo"]


def table_in(folder) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / artifacts.PROFILE / profiling.OPERATIONS).read_text())))


@pytest.mark.parametrize("training", [True, False])
def test_the_steps_wanted_are_in_the_trace_and_no_others(tmp_path, training, capfd):
    record(tmp_path, 2, 2, training=training)
    assert steps_in(tmp_path) == [2, 3]
    found = table_in(tmp_path)
    assert sum(float(row["share"]) for row in found) == pytest.approx(1, abs=1e-4)
    assert [float(row["total_ms"]) for row in found] == sorted((float(r["total_ms"]) for r in found), reverse=True)
    assert max(int(row["calls"]) for row in found) == 2 * LOOPS, "the loop's products, in both steps"
    said = capfd.readouterr().out
    assert f"dpo: profile of {'step' if training else 'batch'} 2 to 3 in {tmp_path}" in said
    assert all(len(line) <= 80 for line in said.split("\n")[1:]) and found[0]["operation"] in said


def test_a_profile_of_before_is_replaced(tmp_path):
    record(tmp_path, 1, 1)
    record(tmp_path, 3, 1)
    assert steps_in(tmp_path) == [3]


def test_a_stage_that_was_not_named_is_not_recorded(tmp_path):
    with profiling.of_stage(Wanted("dpo", 1, 1), "sft", epath.Path(tmp_path), True):
        profiling.begin(1, ())
        profiling.end(1, ())
    assert not (tmp_path / artifacts.PROFILE).exists()


def test_a_profile_is_no_part_of_what_a_manifest_seals(tmp_path):
    (tmp_path / "weights").write_text("w")
    record(tmp_path, 1, 1)
    artifacts.write_manifest(tmp_path, {"name": "dpo"})
    assert list(artifacts.read_manifest(tmp_path)["files"]) == ["weights"]


def test_steps_beyond_a_training_are_an_error_before_it_begins(tmp_path):
    with profiling.of_stage(Wanted("dpo", 9, 2), "dpo", epath.Path(tmp_path), True):
        with pytest.raises(InputError, match="--profile: dpo has 9 steps; there is no step 10"):
            profiling.check(0, 9)
        with pytest.raises(InputError, match="dpo goes on with step 10; step 9 is already done"):
            profiling.check(9, 20)
        profiling.check(8, 10)
        for step in (9, 10):
            profiling.begin(step, ())
            profiling.end(step, ())


def test_batches_beyond_a_stage_are_an_error_when_it_ends_and_nothing_stays_open(tmp_path):
    with pytest.raises(InputError, match="--profile: dpo had 4 batches; there was no batch 6"):
        record(tmp_path, 4, 3, training=False)
    record(tmp_path, 1, 1)  # JAX records once at a time: the one before has ended
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("text", ["dpo", "dpo:1", "dpo:0+1", "dpo:1+0", "dpo:-1+2", ":1+1", "dpo:1+1x", "dpo:a+b"])
def test_another_form_is_an_error(text):
    with pytest.raises(InputError, match=r"--profile: .*expected STAGE:STEP\+N"):
        parse(text, ["dpo"])


def test_the_form_is_read():
    assert parse("a:b:10+3", ["a:b"]) == Wanted("a:b", 10, 3)
    with pytest.raises(InputError, match="--profile: no stage 'dp' is to run; expected one of sft, dpo"):
        parse("dp:1+1", ["sft", "dpo"])


def test_an_operation_has_its_own_time_alone():
    """A loop from 0 to 10 that calls a (1 to 4) and b (5 to 9), which calls a (6 to 7); then a again (12 to 13)."""
    events = [(0.0, 10.0, "while"), (1.0, 4.0, "a"), (5.0, 9.0, "b"), (6.0, 7.0, "a"), (12.0, 13.0, "a")]
    found: dict[str, list[float]] = {}
    for name, own in profiling._own_times(reversed(events)):
        found.setdefault(name, []).append(own)
    assert {name: sorted(times) for name, times in found.items()} == {"while": [3.0], "a": [1.0, 1.0, 3.0], "b": [3.0]}


XSPACE = """
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 9000000 } }
         event_metadata { key: 1 value { id: 1 name: "host work" } } }
planes { name: "/device:%s:0"
         lines { name: "%s" events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
                            events { metadata_id: 2 offset_ps: 1000000 duration_ps: 1000000 }
                            events { metadata_id: 2 offset_ps: 5000000 duration_ps: 2000000 } }
         lines { name: "Steps" events { metadata_id: 3 duration_ps: 9000000 } }
         event_metadata { key: 1 value { id: 1 name: "while.1" } }
         event_metadata { key: 2 value { id: 2 name: "fusion.2" } }
         event_metadata { key: 3 value { id: 3 name: "7" } } }
"""


@pytest.mark.parametrize(("device", "line"), [("TPU", "XLA Ops"), ("GPU", "Stream #13(Compute)")])
def test_accelerators_are_read_by_their_own_timelines(tmp_path, device, line):
    """A trace of the form that TPUs and GPUs write: the host and the lines of steps are not counted."""
    made = jax.profiler.ProfileData.text_proto_to_serialized_xspace(XSPACE % (device, line))
    (tmp_path / "a.xplane.pb").write_bytes(made)
    assert operations([tmp_path / "a.xplane.pb"]) == [
        Operation("fusion.2", pytest.approx(3e-6), 2),
        Operation("while.1", pytest.approx(3e-6), 1),
    ]


def test_a_trace_without_operations_says_so():
    assert profiling.table([]) == "  the trace holds no operation of a device"


def test_batches_of_a_scoring_are_recorded(tmp_path):
    """`shards.over`, by which every stage scores."""
    from tests.stages.test_loop import random_rows

    encoded = random_rows()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    loader = Loader(encoded, 4, mesh=mesh, max_buckets=1, shuffle=False)
    step = jax.jit(lambda batch: jnp.tile(batch.tokens.sum(axis=1)[:, None], (1, 2)).astype(jnp.float32))
    with jax.set_mesh(mesh), profiling.of_stage(Wanted("dpo", 2, 1), "dpo", epath.Path(tmp_path), False):
        config = types.SimpleNamespace(shard_seconds=60.0)  # nothing is kept
        job: Any = types.SimpleNamespace(mesh=mesh, config=config, settings=None)
        call, read = lambda batch: (step, (batch,)), lambda found: {"numbers": np.asarray(found)}
        found = list(shards.over(job, loader, "score", None, call, read))
    assert len(found) == loader.steps_per_epoch and not np.isnan(found[0][1]["numbers"]).any()
    assert steps_in(tmp_path) == [2]
