"""Long proofs of the ppo stage: every variant's first step, every key, and kill -9 at random instants."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mpo_jax import artifacts, metrics, settings, sharding
from mpo_jax.errors import InputError
from mpo_jax.stages.ppo import stage as ppo
from tests.stages import ppo_job
from tests.stages.test_ppo import equal, kept_samples, run, state_of, steps_of

ROOT = Path(__file__).resolve().parent.parent.parent

VARIANTS = [
    variant
    for variant in itertools.product(("ppo", "rloo"), ("reward", "vader"), ("separate", "shared"), (0, 4))
    if variant[:1] != ("rloo",) or variant[2] == "separate"  # RLOO has no critic
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder for each rank, so that inputs are made once."""
    return {rank: tmp_path_factory.mktemp(f"rank{rank}") for rank in (0, 4)}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "scorer", "critic", "rank"), VARIANTS)
def test_first_step_of_every_variant(inputs, stories, algorithm, scorer, critic, rank):
    """KL to the reference 0 and ratio 1 at temperature 0.7; under LoRA the reference is the adapter, not the base."""
    samples = 2 if algorithm == "rloo" else 1
    tokens = 24 if scorer == "vader" else 8  # in eight tokens it finds no sentiment, and there is nothing to learn
    job = ppo_job.make_job(
        inputs[rank], stories, rank=rank, algorithm=algorithm, scorer=scorer, critic=critic, samples=samples,
        temperature=0.7, steps=2, max_new_tokens=tokens,
    )  # fmt: skip
    shutil.rmtree(job.folder, ignore_errors=True)
    summary = run(job)
    first, second = steps_of(job)
    for name in ("kl", "kl_k3", "ratio_deviation_first"):
        assert abs(first[name]) < 1e-5, name
    assert first["ratio_deviation"] > 1e-4
    assert second["kl_k3"] > 1e-6
    assert first["kl_sft"] > 1e-2
    assert (job.folder / artifacts.VALUE).exists() == (algorithm == "ppo")
    assert summary["compiles_after_warmup"] == 0


@pytest.mark.slow
def test_first_step_on_eight_devices(tmp_path, stories):
    """The same numbers over data, fsdp and tensor shards."""
    one = ppo_job.make_job(tmp_path / "one", stories, steps=2)
    eight = ppo_job.make_job(tmp_path / "eight", stories, steps=2, mesh=sharding.make_mesh(2, 2, 2))
    run(one)
    run(eight)
    left, right = steps_of(one)[0], steps_of(eight)[0]
    for name in ("score", "kl_sft", "entropy", "loss", "advantage_std", "value_loss", "explained_variance"):
        assert right[name] == pytest.approx(left[name], rel=1e-3, abs=1e-4), name
    assert abs(right["kl"]) < 1e-5


@pytest.mark.slow
def test_critic_warmup_leaves_the_policy_where_it_was(tmp_path, stories):
    """Also where the critic's gradient reaches the policy's trunk."""
    job = ppo_job.make_job(tmp_path, stories, critic="shared", critic_warmup=2, steps=3, weight_decay=0.1)
    run(job)
    kl = [line["kl_k3"] for line in steps_of(job)]
    assert all(abs(each) < 1e-7 for each in kl)
    assert metrics.read(job.folder)[-1]["eval/kl_k3"] > 1e-6, "the third step moved it"


# Every key ------------------------------------------------------------------------------------------------------------

START = ppo_job.SMALL | {"steps": 2, "eval_every": 1, "kl_target": 1.0}
FLIPS = {
    "batch_size": 4, "epochs": (2.0, {"steps": 0, "batch_size": 24}), "steps": 1, "learning_rate": 2e-3,
    "schedule": "constant", "warmup": 0.5, "end_fraction": 0.5, "weight_decay": 0.1, "beta1": 0.5, "beta2": 0.5,
    "eps": 1e-2, "clip_norm": 0.1, "moments": "bfloat16", "eval_every": 2, "eval_batches": (1, {"batch_size": 4}),
    "select": ("best", {"best_kl": 1e-6, "critic_warmup": 1}), "seed": 1, "scorer": "vader",
    "algorithm": ("rloo", {"samples": 2}),
    "samples": 2, "temperature": 0.7, "max_new_tokens": 4, "inner_epochs": 1, "minibatches": 1, "clip": 0.01,
    "value_clip": 0.01, "value_learning_rate": 1e-2, "critic": "shared", "critic_warmup": 1, "entropy": 0.1,
    "gamma": 0.5, "lam": 0.5, "whiten": False, "kl_term": ("k2", {"steps": 3}), "kl_coefficient": 0.5,
    "kl_target": 0.5, "kl_gain": 0.5, "target_kl": 1e-9, "missing_eos_penalty": 1.0, "normalise_scores": True,
    "score_clip": 0.1, "eval_prompts": 4, "best_kl": 1e-9, "table_rows": 1, "gold": "vader",
}  # fmt: skip
"""Another value of each key, with what else must be set for it to matter."""
ELSEWHERE = {"data", "replay_loss", "replay_coefficient", "replay_beta"}
"""Read where another stage or another file gives more: test_small_configs.py, test_replay.py."""


def left_by(job):
    """All that a run leaves but times: weights, last state, metrics, samples, summary; or its error."""
    shutil.rmtree(job.folder, ignore_errors=True)
    try:
        summary = run(job)
    except InputError as error:
        return str(error)
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in metrics.read(job.folder)]
    left = ocp.PyTreeCheckpointer().restore(job.folder / artifacts.WEIGHTS), state_of(job)[1]["params"]
    params = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(left)]
    return lines, params, kept_samples(job), json.dumps(summary, default=str)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, stories):
    """`(settings) -> what a run leaves`, each once."""
    folder, known = tmp_path_factory.mktemp("keys"), {}

    def found(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = left_by(ppo_job.make_job(folder, stories, **settings))
        return known[key]

    return found


def test_every_key_has_another_value():
    """Of all that enters the stage's hash."""
    assert set(settings.content(ppo.Settings())) - {"kind"} == set(FLIPS) | ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("key", FLIPS)
def test_every_key_is_read(baseline, key):
    """EasyDeL's num_ppo_epochs was read by nothing."""
    flip = FLIPS[key]
    value, context = flip if isinstance(flip, tuple) else (flip, {})
    start = START | context
    assert start.get(key, ppo.Settings.model_fields[key].default) != value
    assert baseline(**(start | {key: value})) != baseline(**start)


@pytest.mark.slow
@pytest.mark.parametrize("role", ppo.STAGE.roles)
def test_every_input_is_read(tmp_path, stories, role):
    job = ppo_job.make_job(tmp_path, stories, **START)
    before = left_by(job)
    with jax.set_mesh(job.mesh):
        reward = ppo_job.reward_model(job, "other", seed=4)
    other = {
        "init": job.inputs["sft"],
        "reference": job.inputs["sft"],
        "reward": reward,
        "prompts": ppo_job.part(job.inputs["prompts"], "easy"),
        "sft": None,
    }
    inputs = {name: artifact for name, artifact in (dict(job.inputs) | {role: other[role]}).items() if artifact}
    assert left_by(ppo_job.replaced(job, inputs=inputs)) != before


# Kills ----------------------------------------------------------------------------------------------------------------

KILLED = {"steps": 14, "save_every": 1, "eval_every": 4, "kl_target": 1.0, "keep": 2}
SCRIPT = """
import sys; sys.path[:0] = ["."]
import jax; jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from tests.stages import ppo_job, test_ppo
test_ppo.run(ppo_job.make_job(Path({folder!r}), Path({stories!r}), **{settings!r}))
"""


def begin(folder: Path, stories: Path, cache: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    code = SCRIPT.format(folder=str(folder), stories=str(stories), settings=KILLED)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def last_step(folder: Path) -> int:
    lines = metrics.read(folder)
    return int(lines[-1]["step"]) if lines else 0


@pytest.mark.slow
def test_killed_five_times_equals_uninterrupted(tmp_path, stories):
    """Policy, critic, both optimizers' moments, KL coefficient, data position and keys, bit for bit on one device."""
    cache, whole, killed = tmp_path / "cache", tmp_path / "whole", tmp_path / "killed"
    process = begin(whole, stories, cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()[-2000:]
    chance = random.Random(0)
    for number in range(5):
        before = last_step(killed / "mpo")
        process = begin(killed, stories, cache)
        goal = min(before + chance.randint(1, 3), KILLED["steps"] - 1)
        deadline = time.time() + 600
        while last_step(killed / "mpo") < goal and time.time() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        print(f"kill {number + 1}: at step {last_step(killed / 'mpo')}")
    process = begin(killed, stories, cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()[-2000:]
    left, right = (ppo_job.make_job(folder, stories, **KILLED) for folder in (whole, killed))
    step, state = state_of(left)
    assert step == KILLED["steps"]
    assert equal(state_of(right)[1], state)
    assert {"step", "params", "opt_state", "key", "extra"} <= state.keys()
    assert kept_samples(right) == kept_samples(left)
    assert [line["step"] for line in steps_of(right)] == list(range(1, KILLED["steps"] + 1))
