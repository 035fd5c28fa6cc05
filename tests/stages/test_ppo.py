"""A ppo stage on a real tiny LLaMA enters; its promises are checked: first step, metrics, resumes, errors."""

import itertools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, metrics, recipes
from mpo_jax.artifacts import POLICY, REWARD
from mpo_jax.checkpoint import Checkpoints
from mpo_jax.errors import InputError
from mpo_jax.stages import job as jobs
from mpo_jax.stages import nonfinite
from mpo_jax.stages.job import Artifact
from mpo_jax.stages.ppo import stage as ppo
from mpo_jax.stages.ppo import update
from tests.stages import ppo_job

LOGGED = {
    "score", "score_std", "kl", "kl_k3", "kl_token", "kl_token_k3", "kl_error", "kl_sft", "kl_coefficient", "ratio",
    "ratio_deviation", "ratio_deviation_first", "approx_kl", "approx_kl_k3", "clip_fraction", "value_clip_fraction",
    "entropy", "explained_variance", "value_loss", "advantage", "advantage_std", "response_len", "finished",
    "score_length_correlation", "repetition", "sampler_scorer_difference", "loss", "grad_norm", "learning_rate",
    "updates", "response_tokens", "tokens_per_second", "seconds_rollout", "seconds_scoring", "seconds_update",
}  # fmt: skip
"""What every step leaves in metrics.jsonl."""


def run(job):
    job.folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(job.mesh):
        return ppo.run(job)


def state_of(job, step=None):
    """The saved state of a step (the latest) as plain arrays: parameters, both optimizers', KL coefficient, key."""
    found = Checkpoints(job.folder / "checkpoints")
    step = found.latest_step() if step is None else step
    found.close()
    return step, ocp.PyTreeCheckpointer().restore(job.folder / "checkpoints" / "last" / str(step) / "state")


def equal(left, right) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right)))


def kept_samples(job) -> str:
    return (job.folder / artifacts.TRAINING_SAMPLES).read_text()


def steps_of(job):
    return [line for line in metrics.read(job.folder) if "score" in line]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, stories):
    """At temperature 0.7, with every optional input: three steps of two epochs of two minibatches."""
    job = ppo_job.make_job(tmp_path_factory.mktemp("ppo"), stories, temperature=0.7, kl_target=1.0, keep=3)
    return job, run(job)


def test_first_step(ran):
    """KL to the reference and log-ratio begin at 0, both from the scorer; then they move, and the ratio is clipped."""
    first, *later = steps_of(ran[0])
    for name in ("kl", "kl_k3", "kl_error", "ratio_deviation_first"):
        assert abs(first[name]) < 1e-5, name
    assert first["ratio_deviation"] > 1e-2, "later epochs move the ratio"
    assert first["clip_fraction"] > 0
    assert all(line["kl_k3"] > 1e-3 for line in later)
    assert all(line["ratio_deviation_first"] < 1e-5 for line in later)
    assert first["sampler_scorer_difference"] < 1e-3
    assert first["kl_sft"] > 0.1


def test_everything_is_logged(ran):
    for line in steps_of(ran[0]):
        assert line.keys() >= LOGGED
        assert all(line[name] > 0 for name in ("seconds_rollout", "seconds_scoring", "seconds_update"))
        phases = line["seconds_rollout"] + line["seconds_scoring"] + line["seconds_update"]
        assert line["tokens_per_second"] == pytest.approx(line["response_tokens"] / phases, rel=0.5)
        assert line["updates"] == 4


def test_one_trace_for_each_program_and_none_later(ran):
    _, summary = ran
    assert summary["buckets"] == 1 and summary["compiles"] == 4, "the evaluation samples with the rollout's program"
    assert summary["compiles_after_warmup"] == 0


def test_adaptive_coefficient(ran):
    """Ziegler et al. 2019, section 2.2: of the mean KL of each step's rollout."""
    lines = steps_of(ran[0])
    for now, then in itertools.pairwise(lines):
        error = np.clip((now["kl"] - 1.0) / 1.0, -0.2, 0.2)
        assert then["kl_coefficient"] == pytest.approx(now["kl_coefficient"] * (1 + 0.1 * error), rel=1e-5)
    assert lines[0]["kl_coefficient"] == pytest.approx(0.05)


def test_leaves_policy_critic_and_samples(ran):
    job, summary = ran
    model = jobs.model(job)
    for name, head in ((artifacts.WEIGHTS, False), (artifacts.VALUE, True)):
        found = checkpoint.restore_weights(job.folder / name, jobs.abstract_weights(model, job.mesh, head=head))
        assert equal(found, state_of(job)[1]["params"]["policy" if name == artifacts.WEIGHTS else "value"])
    rows = [json.loads(line) for line in kept_samples(job).splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert all(len(row["replies"]) == 2 and row["replies"][0].keys() == {"prompt", "reply", "score"} for row in rows)
    assert rows[0]["replies"][0]["prompt"] == rows[1]["replies"][0]["prompt"]
    assert summary["best"]["score"] == max(row["evaluation"]["score"] for row in rows)


def copied(job, folder, last_step):
    """The stage's folder as a kill after the checkpoint of `last_step` left it."""
    shutil.copytree(job.folder, folder, dirs_exist_ok=True)
    for step in (folder / "checkpoints" / "last").iterdir():
        if step.name.isdigit() and int(step.name) > last_step:
            shutil.rmtree(step)
    for name in (artifacts.WEIGHTS, artifacts.VALUE):
        shutil.rmtree(folder / name)
    return ppo_job.replaced(job, folder=epath.Path(folder))


def test_resumed_equals_uninterrupted(ran, tmp_path):
    """trl #2444, OpenRLHF #256: policy, critic, both optimizers, KL coefficient, keys and position of the data."""
    job, summary = ran
    resumed = copied(job, tmp_path / "mpo", last_step=2)
    again = run(resumed)
    assert equal(state_of(resumed), state_of(job))
    assert again["best"] == summary["best"]
    assert kept_samples(resumed) == kept_samples(job)

    def timeless(job):
        return [{k: v for k, v in line.items() if "second" not in k} for line in metrics.read(job.folder)]

    assert timeless(resumed) == timeless(job)


@pytest.mark.slow
def test_reward_that_becomes_nan(ran, tmp_path):
    """The stage stops, names the rows, and the last good checkpoint stays."""
    job, _ = ran
    broken = copied(job, tmp_path / "mpo", last_step=2)
    model = jobs.model(job)
    head = checkpoint.restore_weights(
        job.inputs["reward"].folder / artifacts.WEIGHTS, jobs.abstract_weights(model, job.mesh, head=True)
    )
    head |= {"head": jax.tree.map(lambda x: x * np.nan, head["head"])}
    checkpoint.save_weights(epath.Path(tmp_path) / "reward" / artifacts.WEIGHTS, head)
    inputs = dict(job.inputs) | {"reward": Artifact("reward", REWARD, epath.Path(tmp_path) / "reward")}
    with pytest.raises(nonfinite.NonFinite, match=r"step 3: score is nan; batch ids \[\d"):
        run(ppo_job.replaced(broken, inputs=inputs))
    step, state = state_of(broken)
    assert step == 2
    assert equal(state, state_of(job, 2)[1])


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"minibatches": 3}, "minibatches: 3 do not divide batch_size 8"),
        ({"microbatch": 3}, "microbatch: 3 rows do not divide the minibatch of 4"),
        ({"inner_epochs": 0}, "inner_epochs: 0"),
        ({"algorithm": "rloo"}, "samples: 1 with rloo"),
        ({"algorithm": "trpo"}, "algorithm: 'trpo'"),
        ({"kl_term": "k3"}, "kl_term: 'k3'"),
        ({"critic": "none"}, "critic: 'none'"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"scorer": "human"}, "scorer: 'human'"),
        ({"epochs": 0.0}, "epochs: 0.0"),
        ({"select": "worst"}, "select: 'worst'"),
        ({"reward": ""}, r"stages\.mpo\.reward: empty, but scorer needs it"),
        ({"reward": "", "scorer": {"vader": 1.0, "reward": 0.5}}, r"stages\.mpo\.reward: empty, but scorer needs it"),
    ],
)
def test_bad_settings(ran, settings, words):
    ppo_job.refused(ran[0], settings, words)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_new_tokens"])
def test_no_truncated_sampling(ran, name):
    """trl #235 #351: they make the KL that of another distribution. There is no such key; one put there is an error."""
    with pytest.raises(InputError, match=f"no key '{name}'"):
        recipes.stage("ppo", **{name: 5})
    ppo_job.refused(ran[0], {name: 5}, f"{name}: no such setting")
    assert ppo.sampling_config(ran[0]).top_k is None


def test_a_reference_of_another_vocabulary(ran, tmp_path):
    """Its ids mean other tokens."""
    job, _ = ran
    other = Artifact("dpo", POLICY, epath.Path(tmp_path))
    artifacts.write_manifest(other.folder, {"vocabulary": 600})
    with pytest.raises(InputError, match=r"stages\.mpo\.reference: 'dpo' has a vocabulary of 600 tokens"):
        ppo.STAGE.check(ppo_job.replaced(job, inputs=dict(job.inputs) | {"reference": other}))


def test_empty_hard_set(tmp_path, stories):
    with pytest.raises(InputError, match="split/hard is empty; change the split's threshold"):
        run(ppo_job.make_job(tmp_path, stories, prompts=0))


def test_warns_of_a_negative_kl(capsys):
    watch = update.make_watch("mpo")
    watch(1, {"kl": -0.2, "kl_error": 0.1})
    assert not capsys.readouterr().out, "noise"
    watch(2, {"kl": -0.5, "kl_error": 0.1})
    watch(3, {"kl": -0.5, "kl_error": 0.1})
    assert capsys.readouterr().out.count("warning: stages.mpo: at step 2 the mean KL") == 1
