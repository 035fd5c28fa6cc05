"""What a split's gap may be of, and how pairs are divided by it, on real pairs of HH: each measure against numbers that
are worked out by hand, by SciPy, or by a policy's own log-probs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy import stats

from mpo_jax import artifacts
from mpo_jax.errors import InputError
from mpo_jax.stages import buckets, corpus, gaps, rows, split
from mpo_jax.stages import job as jobs
from mpo_jax.types import BUCKETS, LEFT_OUT
from tests.stages import ppo_job
from tests.stages.ppo_job import part, policy, refused
from tests.stages.split_job import make_job, reward_model, run_split


@pytest.fixture(scope="module")
def job(tmp_path_factory, shared):
    return make_job(tmp_path_factory.mktemp("gaps"), shared)


@pytest.fixture(scope="module")
def policies(job):
    with jax.set_mesh(job.mesh):
        return {"implicit": policy(job, "dpo", seed=5), "reference": policy(job, "sft", seed=2)}


def made(job, shared, folder, inputs, **settings):
    """The split's artifact under other settings, which name the inputs that it is given."""
    named = dict.fromkeys(("reward", "implicit", "reference", "second"), "")
    named |= {role: artifact.name for role, artifact in inputs.items()}
    return run_split(make_job(folder, shared, inputs=inputs, **(named | settings)))


def table(artifact):
    return artifacts.read_gaps(artifact.folder)


def log_probs(job, artifact, encoded):
    """Summed log-probs f32 [rows,2] of replies under a policy, by the program that DPO's tests hold to transformers."""
    model = jobs.model(job)
    with jax.set_mesh(job.mesh):
        weights = jobs.load_weights(job, artifact, model)
        loader = jobs.loader(job, encoded, 8, shuffle=False, max_length=None)
        program = rows.logps_program(job, model, weights, loader.batch(0), 2)
        return rows.compute(job, program, weights, encoded, 8)


def test_the_default_is_the_reward_model_s_gap(job, tmp_path, shared):
    whole = run_split(job)
    report = artifacts.read_json(whole.folder / artifacts.REPORT)
    assert (report["measures"], report["unit"]) == (["reward"], "reward units")
    assert set(split.programs(job)) == {"score"} and sum(report["counts"].values()) == report["pairs"]


def test_implicit_rewards_and_losses_need_no_reward_model(job, policies, tmp_path, shared):
    found = table(made(job, shared, tmp_path / "implicit", policies, gap="implicit", beta=0.5))
    with jax.set_mesh(job.mesh):
        encoded = corpus.share_pairs(job, jobs.model(job), jobs.load_tokenizer(job, jobs.model(job)), "policy")
    policy_logps, reference = (log_probs(job, policies[role], encoded) for role in ("implicit", "reference"))
    np.testing.assert_allclose(found.score_chosen, 0.5 * (policy_logps - reference)[:, 0], atol=1e-4)
    np.testing.assert_allclose(found.gap, found.score_chosen - found.score_rejected)
    only = {"reference": policies["reference"]}
    artifact = made(job, shared, tmp_path / "loss", only, gap="reference_loss")
    lens = encoded.piece_lens[:, 1:]
    np.testing.assert_allclose(table(artifact).score_rejected, reference[:, 1] / lens[:, 1], atol=1e-4)
    assert artifacts.read_json(artifact.folder / artifacts.REPORT)["unit"] == "nats per token"


def test_the_data_s_own_margins(job, tmp_path, shared):
    rows = [
        {
            "prompt": f"Tell me about number {n}.",
            "chosen": f"It is {n}.",
            "rejected": "I don't know.",
            "margin": n - 20.0,
        }
        for n in range(120)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    artifact = made(job, shared, tmp_path / "given", {}, gap="given", data=tmp_path / "rows.jsonl", limit=0)
    found = table(artifact)
    assert sorted(found.gap.tolist()) == sorted(rows[number]["margin"] for number in found.id)
    assert not found.score_rejected.any() and (found.gap < 0).any()
    with pytest.raises(InputError, match=r"^stages\.split\.gap: \d+ of \d+ pairs have no margin; "):
        made(job, shared, tmp_path / "none", {}, gap="given")


def test_several_measures_are_joined_by_rank(job, policies, tmp_path, shared):
    gap = np.asarray([0.5, -3.0, 0.0, 2.0, -0.5])
    ranks = stats.rankdata(np.abs(gap)) / 5
    np.testing.assert_allclose(gaps.signed_ranks(gap), np.sign(gap) * ranks)
    inputs = policies | {"reward": job.inputs["reward"]}
    measured = {
        name: table(made(job, shared, tmp_path / name, {role: inputs[role] for role in gaps.MEASURES[name]}, gap=name))
        for name in ("reward", "implicit")
    }
    both = table(made(job, shared, tmp_path / "both", inputs, gap=("reward", "implicit")))
    wanted = [np.sign(each.gap) * stats.rankdata(np.abs(each.gap)) / len(each.gap) for each in measured.values()]
    np.testing.assert_allclose(both.gap, np.mean(wanted, axis=0), atol=1e-6)
    assert np.abs(both.gap).max() <= 1
    flag = table(made(job, shared, tmp_path / "flag", inputs, gap="reward,implicit"))  # as a flag gives it
    np.testing.assert_array_equal(flag.gap, both.gap)


def test_top_pairs_and_a_band_by_hand():
    gap = np.asarray([3.0, 2.0, 2.0, 1.9, 1.0, -0.5, -1.95, -2.0], np.float32)
    assert buckets.top_threshold("split", gap, 2) == 2.0
    names = [*BUCKETS, "left out"]

    def told(bucket):
        return [names[index] for index in bucket]

    bucket = buckets.buckets(gap, 2.0, band=0.25)  # from 1.5 up in size, below 2
    assert told(bucket) == ["easy", "easy", "easy", "left out", "hard", "hard", "left out", "flipped"]
    assert told(buckets.only_top(bucket, gap, 2))[:3] == ["easy", "easy", "hard"]
    assert told(buckets.agreed(bucket, np.asarray([1.0] * 7 + [-0.1])))[-1] == "flipped"
    assert told(buckets.agreed(bucket, np.asarray([-1.0] * 7 + [0.0])))[-1] == "hard"
    with pytest.raises(
        InputError, match=r"^stages\.split\.top_k: 6; expected at most 5, the pairs whose gap is above 0"
    ):
        buckets.top_threshold("split", gap, 6)


def test_a_split_of_the_top_pairs_leaves_a_band_out(job, tmp_path, shared):
    artifact = made(job, shared, tmp_path / "top", {"reward": job.inputs["reward"]}, top_k=5, quantile=0.0, band=0.5)
    found = table(artifact)
    easy = buckets.pairs(part(artifact, "easy"))
    assert len(easy) == 5 and set(easy.id.tolist()) == set(found.id[np.argsort(-found.gap)[:5]].tolist())
    left = found.bucket == LEFT_OUT
    threshold = np.sort(found.gap)[-5]
    np.testing.assert_array_equal(left, (np.abs(found.gap) < threshold) & (np.abs(found.gap) >= threshold / 2))
    hard = set(buckets.pairs(part(artifact, "hard")).id.tolist())
    assert left.any() and not hard & set(found.id[left].tolist()) and hard | set(found.id[left].tolist())
    assert artifacts.read_json(artifact.folder / artifacts.REPORT)["counts"]["left out"] == left.sum()
    assert len(buckets.pairs(artifact)) == len(found.id)  # all of them


def test_pairs_are_flipped_only_where_a_second_reward_model_agrees(job, tmp_path, shared):
    with jax.set_mesh(job.mesh):
        second = reward_model(job, "second", seed=9)
    inputs = {"reward": job.inputs["reward"]}
    one = table(made(job, shared, tmp_path / "one", inputs))
    other = table(made(job, shared, tmp_path / "other", {"reward": second}))
    both = table(made(job, shared, tmp_path / "both", inputs | {"second": second}))
    flipped = BUCKETS.index("flipped")
    np.testing.assert_array_equal(both.bucket == flipped, (one.bucket == flipped) & (other.gap < 0))
    moved = both.bucket != one.bucket
    assert moved.any() and (both.bucket[moved] == BUCKETS.index("hard")).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gap": "size"}, r"stages\.split\.gap: 'size'; expected one of reward, given, implicit, reference_loss"),
        ({"gap": ["reward", "reward"]}, r"stages\.split\.gap: reward,reward; expected each once"),
        ({"gap": "implicit"}, r"stages\.split\.reward: 'reward', but gap=implicit does not read it; expected an empty"),
        ({"gap": "implicit", "reward": ""}, r"stages\.split\.implicit: empty, but gap=implicit needs it"),
        ({"gap": "reference_loss", "reward": "", "implicit": "sft", "reference": "sft"}, r"implicit: 'sft', but gap="),
        ({"reward": ""}, r"stages\.split\.reward: empty, but gap=reward needs it"),
        ({"gap": "given", "pair_source": "sampled"}, r"gap: given, but nobody gave sampled pairs a margin"),
        ({"top_k": 3}, r"stages\.split\.top_k: 3, beside a quantile of 0\.5; expected one of them"),
        ({"band": 1.0}, r"stages\.split\.band: 1\.0; expected below 1"),
    ],
)
def test_settings_that_cannot_be_meant(job, settings, message):
    refused(job, settings, message)


def test_a_second_reward_model_that_saw_the_share_is_refused(job):
    other = job.config.stages["reward"].model_copy(update={"share": "policy"})
    changed = ppo_job.replaced(job, {"share": "sft_reward"})
    config = changed.config.model_copy(update={"stages": changed.config.stages | {"other": other}})
    inputs = {"reward": dataclasses.replace(job.inputs["reward"], name="other"), "second": job.inputs["reward"]}
    with pytest.raises(InputError, match="'reward' is trained on the share 'sft_reward' itself"):
        split.check(ppo_job.replaced(changed, config=config, inputs=inputs))
