"""A tiny random decoder and random rows enter the training loop; its promises about steps and resumes are checked."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpo_jax import checkpoint, metrics, sharding
from mpo_jax import settings as declared
from mpo_jax.checkpoint import Checkpoints
from mpo_jax.data.encode import Encoded
from mpo_jax.data.loader import Loader
from mpo_jax.data.tokenizer import Conventions
from mpo_jax.errors import PREEMPTED, InputError
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.run import Run
from mpo_jax.stages import gradients, kinds, loop, nonfinite, reward, sft
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ModelConfig("llama", 100, 2, 16, 4, 2, 4, 32, 64)
SETTINGS = {
    "batch_size": 8, "epochs": 1.0, "steps": 12, "learning_rate": 1e-2, "warmup": 0.1, "weight_decay": 0.01,
    "eval_every": 5, "eval_batches": 3, "save_every": 3,
}  # fmt: skip


def random_rows(count=45, replies=2, seed=0) -> Encoded:
    random = np.random.default_rng(seed)
    lens = random.integers(2, 10, (count, 1 + replies))
    unknown = np.full(count, np.nan, np.float32)
    return Encoded(
        tokens=random.integers(0, 100, lens.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lens)]),
        id=np.arange(count, dtype=np.int32) + 1000,
        prompt_id=np.arange(count, dtype=np.int32),
        confidence=unknown,
        margin=unknown,
        label=unknown,
        replies=replies,
        conventions=Conventions(1, 2, 2, False),
        counts={},
        key="",
    )


@functools.cache
def start():
    return jax.device_get(jax.jit(lambda: decoder.init(CONFIG, jax.random.key(0), head=True))())


def make_job(mesh, kind="reward", **settings) -> Job:
    """A stage of this module's small decoder, which needs no folder: it is handed its weights and rows."""
    stage = kinds.KINDS[kind].settings(kind=kind, **(SETTINGS | settings))
    nowhere = epath.Path(".")
    return Job("small", stage, Run(stages={"small": stage}), nowhere, nowhere, {}, mesh)


def training(mesh, loss=None, train_rows=None, **settings) -> tuple[loop.Trainer, int]:
    """The trainer, and its steps."""
    job = make_job(mesh, **settings)
    config = CONFIG.for_mesh(mesh)
    extra = config.padded_vocab - CONFIG.padded_vocab

    def pad(name, leaf):
        whole = "embed/" in name or "lm_head" in name
        return np.pad(leaf, ((0, extra if whole else 0),) + ((0, 0),) * (leaf.ndim - 1))

    weights = sharding.map_weights(pad, start())
    params = jax.device_put(weights, sharding.tree_shardings(weights, mesh))

    def rows(encoded, max_buckets=2, shuffle=True):
        return Loader(encoded, job.settings.batch_size, mesh=mesh, max_buckets=max_buckets, shuffle=shuffle)

    loader = rows(random_rows()) if train_rows is None else rows(train_rows, max_buckets=1)
    heldout = rows(random_rows(20, seed=1), shuffle=False) if train_rows is None else loader
    steps = loop.total_steps(job, loader)
    like = shapes.batch(job, job.settings.batch_size, 32, 16)
    found = loop.programs(job, config, loss or reward.make_loss(config), params, like, steps)
    return loop.supervised(job, found, params, {"base": {}}, loader, heldout, steps), steps


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def train(folder, mesh=None, **settings):
    mesh = one_device() if mesh is None else mesh
    with jax.set_mesh(mesh):
        return loop.train(*training(mesh, **settings), folder, mesh)


def equal(left, right) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), left, right)))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    params, summary = train(folder)
    return params, summary, metrics.read(folder)


def test_summary_and_metrics(uninterrupted):
    _, summary, lines = uninterrupted
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"accuracy", "grad_norm", "learning_rate", "tokens", "padding_efficiency"} <= set(steps[0])
    assert [line["rows"] for line in steps] == [SETTINGS["batch_size"]] * 12, "every step is of a full batch"
    assert [line["step"] for line in lines if "eval/loss" in line] == [5, 10, 12]
    assert summary["compiles_after_warmup"] == 0
    assert summary["buckets"] == 2 and summary["compiles"] == 4, "step and evaluation, for each"
    assert all(line["seconds"] >= 0 for line in steps), "all is compiled before the first step"
    assert summary["best"]["loss"] == min(line["eval/loss"] for line in lines if "eval/loss" in line)


def test_resumed_equals_uninterrupted_bit_for_bit(uninterrupted, tmp_path, monkeypatch):
    params, summary, lines = uninterrupted
    stopped = loop.Loader.batch

    def stop_at_eight(self, step):
        if step == 8 and self.steps_per_epoch == training_steps:
            raise KeyboardInterrupt
        return stopped(self, step)

    training_steps = training(one_device())[0].loader.steps_per_epoch
    monkeypatch.setattr(loop.Loader, "batch", stop_at_eight)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(loop.Loader, "batch", stopped)
    resumed, again = train(tmp_path)
    assert equal(resumed, params)
    assert again["best"] == summary["best"]
    timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(tmp_path)]
    assert timeless == [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_snapshots_are_the_states_parameters_and_change_no_number(uninterrupted, tmp_path, monkeypatch):
    """Killed between a snapshot and the next state too: what it left is written again, with the same numbers."""
    settings = {"kind": "sft", "snapshots": 3, "keep": 12}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    params, summary = train(whole, **settings)
    assert equal(params, uninterrupted[0]) and summary["snapshots"] == [3, 6, 9]
    assert "snapshots" not in uninterrupted[1]
    like = training(one_device())[0].params
    for step in (3, 6, 9):
        with checkpoint.Checkpoints(whole / "checkpoints") as checkpoints:
            best = checkpoints.restore(
                step, gradients.abstract_state(training(one_device())[0].optimizer, like, one_device())
            )
        assert equal(checkpoint.restore_weights(whole / "snapshots" / str(step), like), best[0].params)

    save = checkpoint.save_weights

    def then_killed(folder, weights):
        save(folder, weights)
        if folder.name == "9":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_weights", then_killed)
    with pytest.raises(KeyboardInterrupt):
        train(killed, **settings)
    monkeypatch.setattr(checkpoint, "save_weights", save)
    again, _ = train(killed, **settings)
    assert equal(again, params)
    for step in (3, 6, 9):
        left, right = (checkpoint.restore_weights(folder / "snapshots" / str(step), like) for folder in (whole, killed))
        assert equal(left, right)


def test_snapshots_lie_evenly_and_never_at_the_end():
    settings = kinds.KINDS["sft"].settings(kind="sft", snapshots=4)
    assert settings.snapshot_steps(20) == [4, 8, 12, 16]
    assert settings.snapshot_steps(3) == [1, 2] and settings.snapshot_steps(1) == []
    assert declared.content(settings) != declared.content(kinds.KINDS["sft"].settings(kind="sft"))
    assert "snapshots" not in declared.content(kinds.KINDS["ppo"].settings(kind="ppo"))
    assert "snapshots" not in kinds.KINDS["reward"].settings.model_fields


def test_accumulated_equals_full_batch(tmp_path, uninterrupted):
    params, _, _ = uninterrupted
    accumulated, _ = train(tmp_path, microbatch=2)
    worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, accumulated)))
    assert worst < 2e-4


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_loss_curve_is_that_of_one_device(tmp_path, uninterrupted, shape):
    lines = uninterrupted[2]
    train(tmp_path, sharding.make_mesh(*shape))
    one = [line["loss"] for line in lines if "loss" in line]
    many = [line["loss"] for line in metrics.read(tmp_path) if "loss" in line]
    np.testing.assert_allclose(many, one, atol=1e-4)


def test_state_moves_to_another_mesh(tmp_path, uninterrupted):
    """orbax #332: saved on eight devices, continued on one; the vocabulary was padded otherwise there."""
    eight = sharding.make_mesh(2, 2, 2)
    whole, _ = training(eight)
    with jax.set_mesh(eight):
        state = gradients.init_state(whole.optimizer, whole.params, whole.key, eight)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.save(0, state, {"best": None, "best_step": None, "evaluation": {}})
        checkpoints.close()
    train(tmp_path)
    losses = [line["loss"] for line in metrics.read(tmp_path) if "loss" in line]
    np.testing.assert_allclose(losses, [line["loss"] for line in uninterrupted[2] if "loss" in line], atol=1e-4)


def test_memorises_64_pairs(tmp_path):
    """A broken loss cannot."""
    mesh = one_device()
    settings = {"steps": 150, "learning_rate": 3e-3, "save_every": 1000, "eval_every": 150, "weight_decay": 0.0}
    whole, steps = training(mesh, train_rows=random_rows(64), **settings)
    with jax.set_mesh(mesh):
        params, _ = loop.train(whole, steps, tmp_path, mesh)
        judge = gradients.evaluation_step(reward.make_loss(CONFIG))
        found = loop.evaluate(judge, params, whole.frozen, whole.loader, 1000)
    assert found["accuracy"] >= 0.99


def test_sft_lowers_the_loss(tmp_path):
    mesh = one_device()
    whole, steps = training(mesh, loss=sft.make_loss(CONFIG), train_rows=random_rows(32, replies=1), steps=20)
    with jax.set_mesh(mesh):
        loop.train(whole, steps, tmp_path, mesh)
    losses = [line["loss"] for line in metrics.read(tmp_path) if "loss" in line]
    assert losses[0] == pytest.approx(np.log(100), abs=0.1)
    assert losses[-1] < losses[0] - 0.3


def test_non_finite_loss_stops_and_names_the_rows(tmp_path):
    mesh = one_device()

    def poisoned(params, frozen, batch, key):
        total, weight, sums = reward.make_loss(CONFIG)(params, frozen, batch, key)
        return jnp.where((batch.id == 1007).any(), jnp.nan, total), weight, sums

    whole, steps = training(mesh, loss=poisoned, save_every=1)
    with jax.set_mesh(mesh), pytest.raises(nonfinite.NonFinite, match=r"loss is nan; batch ids \[.*1007.*\]"):
        loop.train(whole, steps, tmp_path, mesh)
    found = Checkpoints(tmp_path / "checkpoints")
    step = found.latest_step()
    if step is not None:
        with jax.set_mesh(mesh):
            state, _ = found.restore(step, gradients.abstract_state(whole.optimizer, whole.params, mesh))
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.params))


def poisoned_by(*ids):
    """The reward loss, NaN on batches that hold any of these rows; its gradient too."""

    def loss(params, frozen, batch, key):
        total, weight, sums = reward.make_loss(CONFIG)(params, frozen, batch, key)
        bad = (batch.id[:, None] == jnp.asarray(ids)[None]).any()
        return jnp.where(bad, jnp.nan, 1.0) * total, weight, sums

    return loss


def bad_steps(ids, steps=12):
    loader = training(one_device())[0].loader
    return [step + 1 for step in range(steps) if np.isin(loader.encoded.id[loader.rows(step)[1]], ids).any()]


def saved_states(folder, whole, mesh):
    """Step -> parameters of every state that is there, the best apart from them."""
    with Checkpoints(folder / "checkpoints") as found, jax.set_mesh(mesh):
        like = gradients.abstract_state(whole.optimizer, whole.params, mesh)
        return {step: found.restore(step, like)[0].params for step in found._last.all_steps()}


@pytest.mark.parametrize(("log_every", "save_every"), [(1, 1), (10, 1), (10, 4), (100, 100)])
def test_a_non_finite_step_is_never_saved_however_seldom_the_loop_logs(tmp_path, log_every, save_every):
    mesh, ids = one_device(), (1007,)
    first = bad_steps(ids)[0]
    whole, steps = training(
        mesh, loss=poisoned_by(*ids), log_every=log_every, save_every=save_every, keep=3, eval_every=100
    )
    with (
        jax.set_mesh(mesh),
        pytest.raises(nonfinite.NonFinite, match=rf"^step {first}: loss is nan; batch ids \[.*1007"),
    ):
        loop.train(whole, steps, tmp_path, mesh)
    saved = saved_states(tmp_path, training(mesh)[0], mesh)
    assert set(saved) == set(list(range(save_every, first, save_every))[-3:]), "and the good ones are not pruned for it"
    for params in saved.values():
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))
    again, steps = training(
        mesh, loss=poisoned_by(*ids), log_every=log_every, save_every=save_every, keep=3, eval_every=100
    )
    told = f"after step {max(saved)}, the last" if saved else "from the beginning"
    with jax.set_mesh(mesh), pytest.raises(nonfinite.NonFinite, match=told):
        loop.train(again, steps, tmp_path, mesh)  # resumes before it, and meets it again


def test_a_non_finite_gradient_under_a_finite_loss_is_seen(tmp_path):
    mesh = one_device()

    def loss(params, frozen, batch, key):
        total, weight, sums = reward.make_loss(CONFIG)(params, frozen, batch, key)
        zero = total - jax.lax.stop_gradient(total)
        return total + jnp.sqrt(zero), weight, sums  # the root's slope at 0 is infinite

    whole, steps = training(mesh, loss=loss, log_every=5, eval_every=100)
    with jax.set_mesh(mesh), pytest.raises(nonfinite.NonFinite, match=r"^step 1: grad_norm is (nan|inf)"):
        loop.train(whole, steps, tmp_path, mesh)


def test_a_stage_may_skip_such_batches_and_counts_them_over_a_resume(tmp_path):
    mesh, ids = one_device(), (1007,)
    bad = bad_steps(ids)
    assert 0 < len(bad) < 6
    settings = {"on_nonfinite": "skip", "log_every": 4, "save_every": 2}

    def go(folder):
        whole, steps = training(mesh, loss=poisoned_by(*ids), **settings)
        with jax.set_mesh(mesh):
            return loop.train(whole, steps, folder, mesh)

    params, summary = go(tmp_path / "whole")
    assert summary["skipped"] == len(bad)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))
    states = saved_states(tmp_path / "whole", training(mesh)[0], mesh)
    assert max(states) == 12
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "last" / "12")
    resumed, again = go(tmp_path / "half")
    assert equal(resumed, params) and again["skipped"] == len(bad)


def test_a_skipped_step_leaves_parameters_and_moments_as_they_were():
    mesh = one_device()
    whole, _ = training(mesh, loss=poisoned_by(*range(1000, 1045)), on_nonfinite="skip")
    with jax.set_mesh(mesh):
        state = gradients.init_state(whole.optimizer, whole.params, whole.key, mesh)
        before = jax.device_get((state.params, state.opt_state))
        state, out = whole.step(state, whole.frozen, whole.loader.batch(0))
    assert int(state.step) == 1 and np.isnan(float(out["loss"]))
    assert equal((state.params, state.opt_state), before)


def test_where_every_batch_is_skipped_the_stage_stops(tmp_path):
    mesh = one_device()
    whole, steps = training(mesh, loss=poisoned_by(*range(1000, 1045)), on_nonfinite="skip", eval_every=100, steps=30)
    with jax.set_mesh(mesh), pytest.raises(nonfinite.NonFinite, match=r"step 1: .* 1\d steps in a row were skipped"):
        loop.train(whole, steps, tmp_path, mesh)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"microbatch": 3}, "microbatch: 3 rows do not divide batch_size 8"),
        ({"schedule": "cosin"}, "schedule: 'cosin'"),
        ({"moments": "int8"}, "moments: 'int8'"),
        ({"epochs": 0.0}, "epochs: 0.0; expected above 0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        declared.parse(kinds.KINDS["reward"].settings, SETTINGS | settings)


def test_epochs_that_make_no_step():
    with pytest.raises(InputError, match=r"stages\.small\.epochs: 0.01; no step to take"):
        training(one_device(), steps=0, epochs=0.01)


def test_microbatches_that_the_mesh_does_not_divide():
    with pytest.raises(InputError, match=r"stages\.small\.microbatch: 2 rows are not divided by mesh"):
        loop.check(make_job(sharding.make_mesh(4, 1, 1, devices=jax.devices()[:4]), microbatch=2))


def run_script(folder) -> subprocess.Popen:
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/stages']\n"
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        "import test_loop; from mpo_jax import stopping\n"
        f"folder = __import__('etils.epath').epath.Path({str(folder)!r})\n"
        "with stopping.Notice(): test_loop.train(folder, steps=400, save_every=5, eval_every=50)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE
    )


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.time() + 120
    while time.time() < deadline:
        lines = metrics.read(folder)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError("the run never got there")


def test_sigterm_saves_and_says_so(tmp_path):
    process = run_script(tmp_path)
    wait_for_step(tmp_path, 12)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert process.returncode == PREEMPTED, process.stderr.read().decode()[-2000:]
    saved = Checkpoints(tmp_path / "checkpoints").latest_step()
    assert saved == max(int(line["step"]) for line in metrics.read(tmp_path))
