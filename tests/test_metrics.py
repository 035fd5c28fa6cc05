"""The metrics writer: late reading, whole lines, cuts on resume, TensorBoard's purge, the bar, Weights & Biases."""

import json
import math
import os
import struct
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from mpo_jax import artifacts, metrics, progress, trackers
from mpo_jax.errors import InputError
from mpo_jax.metrics import MetricsWriter


class Scalar:
    """A stand-in for a device scalar that tells when it is read."""

    def __init__(self, value, log):
        self._value, self._log = value, log

    def __array__(self, *_, **__):
        self._log.append(self._value)
        return np.float32(self._value)


def test_a_step_is_read_when_the_next_is_handed_over(tmp_path):
    reads: list[float] = []
    with MetricsWriter(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": Scalar(step / 2, reads)})
            assert reads == [s / 2 for s in range(1, step)]
            assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, step))
            assert log.last == (None if step == 1 else (step - 1, {"loss": (step - 1) / 2}))
    assert reads == [0.5, 1.0, 1.5]
    assert metrics.read(tmp_path) == [{"step": s, "loss": s / 2} for s in (1, 2, 3)]


def test_lines_are_json_with_the_step_first_and_non_finite_values_as_text(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = {"a": jax.device_put(0.5, everywhere), "nan": jnp.float32(jnp.nan), "inf": -np.inf, "n": 3}
    with MetricsWriter(tmp_path) as log:
        log.write(7, values)
    line = (tmp_path / artifacts.METRICS).read_text()
    assert line == '{"step": 7, "a": 0.5, "nan": "nan", "inf": "-inf", "n": 3.0}\n'
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (row,) = metrics.read(tmp_path)
    assert math.isnan(row["nan"]) and row["inf"] == -math.inf
    assert metrics.curve(tmp_path, "a") == [(7, 0.5)]
    assert metrics.curve(tmp_path, "absent") == []


def test_evaluations_are_written_at_once_and_in_order(tmp_path):
    with MetricsWriter(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.write_now(1, {"eval/loss": 2.0})
        assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 1, "eval/loss": 2.0}]
        assert log.last == (1, {"loss": 1.0}), "the last step's, not the evaluation's"
    log.close()  # a second time does nothing


def test_a_line_is_one_write(tmp_path, monkeypatch):
    """So a kill between two writes can't tear it, however long it is."""
    log = MetricsWriter(tmp_path)
    sizes = []
    raw = log._lines._file
    log._lines._file = types.SimpleNamespace(
        write=lambda data: sizes.append(len(data)) or raw.write(data), fileno=raw.fileno, close=raw.close
    )
    log.write(1, {f"metric_{i}": float(i) for i in range(2000)})
    log.flush()
    log.close()
    assert len(sizes) == 1 and sizes[0] > 30_000
    assert len(metrics.read(tmp_path)[0]) == 2001


@pytest.mark.parametrize(
    ("step", "kept"),
    [(0, []), (1, [(1, "a")]), (2, [(1, "a"), (2, "a"), (2, "b")]), (9, [(1, "a"), (2, "a"), (2, "b"), (3, "a")])],
)
def test_cut_to_drops_later_steps_and_a_torn_line(tmp_path, step, kept):
    lines = [{"step": 1, "a": 0.0}, {"step": 2, "a": 0.0}, {"step": 2, "b": 0.0}, {"step": 3, "a": 0.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / artifacts.METRICS).write_text(text + '{"step": 4, "a": 0.')
    assert len(metrics.read(tmp_path)) == 4
    metrics.cut_to(tmp_path, step)
    assert [(row["step"], list(row)[1]) for row in metrics.read(tmp_path)] == kept
    text = (tmp_path / artifacts.METRICS).read_text()
    assert text.count("\n") == len(kept) and (not text or text.endswith("}\n"))
    assert os.listdir(tmp_path) == [artifacts.METRICS]


def test_nothing_to_cut_or_read(tmp_path):
    metrics.cut_to(tmp_path, 3)
    assert metrics.read(tmp_path) == []


def events(folder):
    """(step, tag) of all scalars that a reader shows: a session's start drops what stands at or after its step before.

    The rule of tensorboard's event_accumulator (`_MaybePurgeOrphanedData` under file_version 2), over files by age.
    """
    shown: list[tuple[int, str]] = []
    for path in sorted((folder / "events").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [(step, tag) for step, tag in shown if step < event.step]
            shown += [(event.step, value.tag) for value in event.summary.value]
    return shown


@pytest.mark.parametrize("restored", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path, restored):
    """Killed at step 4 with a torn line, resumed from a checkpoint: lines and events are those of one run."""
    first = MetricsWriter(tmp_path)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": float(step)})
    first.flush()
    first._events.close()
    with (tmp_path / artifacts.METRICS).open("a") as stream:
        stream.write('{"step": 5, "lo')
    with MetricsWriter(tmp_path, start=restored) as again:
        for step in range(restored + 1, 7):
            again.write(step, {"loss": float(step)})
    assert metrics.read(tmp_path) == [{"step": s, "loss": float(s)} for s in range(1, 7)]
    assert events(tmp_path) == [(s, "loss") for s in range(1, 7)]


def fail_after(folder, value) -> None:
    with MetricsWriter(folder) as log:
        log.write(1, {"loss": value})
        raise KeyError("the loop's own")


def write_one(folder, value) -> None:
    with MetricsWriter(folder) as log:
        log.write(1, {"loss": value})


def test_a_failing_loop_leaves_its_last_step(tmp_path):
    with pytest.raises(KeyError, match="the loop's own"):
        fail_after(tmp_path, math.nan)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    assert events(tmp_path) == [(1, "loss")]


def test_values_that_fail_do_not_hide_the_error(tmp_path):
    class Broken:
        def __array__(self, *_, **__):
            raise RuntimeError("device lost")

    with pytest.raises(KeyError, match="the loop's own"):
        fail_after(tmp_path, Broken())
    with pytest.raises(RuntimeError, match="device lost"):
        write_one(tmp_path, Broken())


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run", total=3) as log:
        log.write(1, {"loss": 1.0})
        log.write_now(1, {"eval/loss": 1.0})
        assert log.last == (1, {"loss": 1.0}), "all processes check the loss"
    assert not (tmp_path / "run").exists()


def test_progress_shows_loss_speed_and_time_left(tmp_path, monkeypatch):
    times = iter([0.0, 2.0, 4.0, 100.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    screen = progress.Screen(clock=lambda: 50.0)
    monkeypatch.setattr(progress, "SCREEN", screen)
    with MetricsWriter(tmp_path, start=10, total=20) as log:
        for step in (12, 14):
            log.write(step, {"loss": 0.25, "tokens": 500, "padding_efficiency": 0.9})
        log.flush()
        shown = progress.line(log._work, None, 58.0, 120)
        # 4 steps in 8 s, so that 6 take 12; 500 tokens a step, 2 steps in 2 s.
        assert shown.startswith("train  70% [") and " 14/20 00:08<00:12 2.0 s each " in shown
        assert shown.endswith(" loss 0.2500 padding_efficiency 0.9000 tokens/s 500")
        assert screen._works == [log._work]
    assert screen._works == []


def stage_folder(tmp_path, name="mpo-0123456789ab"):
    """A stage's, with its run's settings."""
    folder = epath.Path(tmp_path / name)
    stages = {"mpo": {"kind": "ppo", "beta": 0.5, "scorer": "http://me:secret@host/score", "wandb": True}, "sft": {}}
    artifacts.write_json(folder / artifacts.CONFIG, {"name": "tldr", "model": {"path": "qwen"}, "stages": stages})
    return folder


def test_wandb_only_when_asked_and_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsWriter(tmp_path / "without").close()
    with pytest.raises(InputError, match="wandb is not installed"):
        MetricsWriter(tmp_path / "with", wandb=trackers.Account())
    logged, started = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = stage_folder(tmp_path)
    for start in (0, 1):
        with MetricsWriter(folder, start=start, wandb=trackers.Account("runs", "team")) as log:
            log.write(start + 1, {"loss": 1.0})
    assert logged == [(1, {"loss": 1.0}), "end", (2, {"loss": 1.0}), "end"]
    told = started[0]
    assert told == started[1] and told["resume"] == "allow" and told["id"] == "mpo-0123456789ab"
    assert (told["project"], told["entity"], told["group"], told["job_type"]) == ("runs", "team", "tldr", "ppo")
    assert told["config"] == {"name": "tldr", "model.path": "qwen", "stage.kind": "ppo", "stage.beta": 0.5,
                              "stage.scorer": "http://…@host/score", "stage.wandb": True}  # fmt: skip


def test_the_package_itself_keeps_one_run_of_a_stage_that_is_resumed(tmp_path, monkeypatch):
    """Where `wandb` is installed: offline, in whose files strings lie as they are."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = stage_folder(tmp_path)
    for start in (0, 1):
        with MetricsWriter(folder, start=start, wandb=trackers.Account("runs", "team")) as log:
            log.write(start + 1, {"loss": 1.0})
    kept = [path.read_bytes() for path in sorted(Path(tmp_path).rglob("*.wandb"))]
    assert len(kept) == 2 and b"secret" not in b"".join(kept)
    for content in kept:
        assert all(word in content for word in (b"mpo-0123456789ab", b"team", b"runs", b"stage.beta", b"loss"))


def test_no_tracker_is_told_what_stands_behind_an_address(tmp_path):
    folder = epath.Path(tmp_path / "mpo-0123456789ab")
    address = "https://me:pass/word@host/score?token=hush"
    artifacts.write_json(folder / artifacts.CONFIG, {"name": "x", "stages": {"mpo": {"scorer": address}}})
    assert trackers.known(folder) == {"name": "x", "stage.scorer": "https://…@host/score?…"}


def test_the_run_at_wandb_is_the_stages_own(tmp_path):
    """By its key, in whatever workdir; one that an earlier version began keeps its id."""
    assert trackers.wandb_id(stage_folder(tmp_path)) == trackers.wandb_id(stage_folder(tmp_path / "again"))
    assert trackers.wandb_id(stage_folder(tmp_path, "a#b-0123456789ab")) == "a-b-0123456789ab"
    earlier = stage_folder(tmp_path / "earlier")
    artifacts.write_text(earlier / artifacts.WANDB_ID, "f00d")
    assert trackers.wandb_id(earlier) == "f00d"
    unkeyed = [trackers.wandb_id(stage_folder(tmp_path / name, "mpo")) for name in ("one", "two")]
    assert len(set(unkeyed)) == 2


def test_wandb_that_does_not_begin_is_one_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("permission denied\nfor this project")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(InputError, match="project 'mine' can't be opened: permission denied for this project"):
        MetricsWriter(stage_folder(tmp_path), wandb=trackers.Account("mine"))


def test_tensorboard_is_told_the_settings(tmp_path):
    folder = stage_folder(tmp_path)
    for start in (0, 1):
        with MetricsWriter(folder, start=start) as log:
            log.write(start + 1, {"loss": 1.0})
    shown = events(Path(folder))
    assert [tag for _, tag in shown].count("_hparams_/session_start_info") >= 1 and (2, "loss") in shown
    data = b"".join(path.read_bytes() for path in (folder / "events").iterdir())
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
        found += [value.metadata.plugin_data for value in event.summary.value if "_hparams_" in value.tag]
    told = [HParamsPluginData.FromString(each.content) for each in found if each.plugin_name == "hparams"]
    (given, *_) = [each.session_start_info.hparams for each in told if each.session_start_info.hparams]
    assert given["stage.beta"].number_value == 0.5 and given["name"].string_value == "tldr"
    assert given["stage.wandb"].bool_value and "secret" not in str(told)
    assert sum(each.HasField("session_end_info") for each in told) == 2


def test_an_object_store_gets_the_whole_file(tmp_path, monkeypatch):
    """Object stores can't append: lines gather and the file is written again, at a flush or after a while."""
    (tmp_path / artifacts.METRICS).write_text('{"step": 1}\n')
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    lines = metrics._Lines(metrics.epath.Path(tmp_path / artifacts.METRICS))
    lines.append('{"step": 2}')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    lines.sync()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    monkeypatch.setattr(metrics, "_REMOTE_SECONDS", -1)
    lines.append('{"step": 3}')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    lines.close()


def test_compiles_are_counted():
    before = metrics.compiles()
    double = jax.jit(lambda x: 2 * x + 1)
    x = jnp.ones((3,))
    between = metrics.compiles()
    double(x)
    assert metrics.compiles() == between + 1 >= before + 1
    double(x)
    assert metrics.compiles() == between + 1
