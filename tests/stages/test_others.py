"""PPO by models of others that read the run's own tokens: they score rollouts as transformers does, and as the run's
own reward model does where they are that one.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mpo_jax import artifacts, metrics
from mpo_jax.stages import buckets, candidates, scores
from mpo_jax.stages import job as jobs
from mpo_jax.stages.ppo import evaluation, others, stage
from tests.stages import ppo_job
from tests.tools import reward_models


def test_a_run_by_the_exported_reward_model_is_the_run_by_the_reward_model(tmp_path, stories):
    job = ppo_job.make_job(tmp_path, stories)
    folder = reward_models.export(job, tmp_path / "exported")
    found = {}
    for name, scorer in (("own", "reward"), ("other", f"hf:{folder}")):
        each = ppo_job.replaced(job, {"scorer": scorer}, folder=job.workdir / name)
        each.folder.mkdir()
        with jax.set_mesh(job.mesh):
            summary = stage.run(each)
        found[name] = metrics.read(each.folder), summary["evaluation"]
        texts = json.loads((each.folder / artifacts.TRAINING_SAMPLES).read_text().splitlines()[-1])["replies"]
        found[name] += ([text["reply"] for text in texts],)
    assert found["own"][2] == found["other"][2], "the same replies, after three updates"
    for one, other in zip(found["own"][0], found["other"][0], strict=True):
        for key in {"score", "eval/score", "loss", "kl"} & set(one):  # the KL is 13 nats by then
            assert other[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), key
    assert found["other"][1]["reward_score"] == pytest.approx(found["own"][1]["score"], abs=1e-5)


@pytest.mark.usefixtures("torch")
def test_a_rollout_is_scored_where_transformers_scores_its_text(tmp_path, stories):
    """Where the pad token is one that replies end with, at the last token before it; and no text is written for it."""
    job = ppo_job.make_job(tmp_path, stories, samples=2, algorithm="rloo", temperature=1.0)
    folder = reward_models.export(job, tmp_path / "exported")
    job = ppo_job.replaced(job, {"scorer": f"hf:{folder}"})
    with jax.set_mesh(job.mesh):
        model = jobs.model(job)
        tokenizer = jobs.load_tokenizer(job, model)
        how = stage.sampling_config(job)
        prompts, _ = buckets.prompts_for(job, model, tokenizer, job.settings.eval_prompts)
        batch = candidates.prompt_loader(job, prompts, job.settings.batch_size, shuffle=False).batch(0)
        weights = jobs.load_weights(job, job.inputs["init"], model)
        rollout = stage.programs(job)["rollout"].function(weights, batch, 0, 0)
        real, rows = candidates.rows_of_rollout(jax.device_get(rollout), how, others.conventions(tokenizer))
        ids = [
            [*prompt.tolist(), *reply.tolist()] for prompt, *both in map(rows.row, range(len(rows))) for reply in both
        ]
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": ids[0][-1]}))
        assert list(scores.of_tokens(job, "scorer")) == [f"hf:{folder}"]
        job = dataclasses.replace(job)  # one that has not made its programs yet
        with others.opened(job, "scorer", tokenizer, stage.programs(job)) as ask:
            found = others.on_host(ask(how)({}, rollout))[real]
    np.testing.assert_allclose(found.ravel(), reward_models.judged(folder, ids), atol=3e-5)
    whole = reward_models.judged(reward_models.export(job, tmp_path / "whole"), ids)
    assert abs(found[0, 0] - whole[0]) > 1e-3, "its last token is not what is scored"


def test_a_template_of_its_own_makes_other_tokens(tmp_path, stories):
    job = ppo_job.make_job(tmp_path, stories)
    folder = reward_models.export(job, tmp_path / "exported")
    job = ppo_job.replaced(job, {"scorer": f"hf:{folder}"})
    assert list(scores.of_tokens(job, "scorer")) == [f"hf:{folder}"]
    assert scores.of_tokens(job, "gold") == {}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": reward_models.CHATML}))
    assert scores.of_tokens(job, "scorer") == {}
    assert scores.of_tokens(dataclasses.replace(job, preset=object()), "scorer") == {}, "a plan knows no tokenizer"


def test_evaluation_samples_the_next_replies_while_others_score_the_last(tmp_path, stories):
    """The order in which the device and the scorer are asked; and the replies of a batch are the batch's own."""
    job = ppo_job.make_job(tmp_path, stories, eval_prompts=24, scorer="vader")
    told: list[str] = []
    with jax.set_mesh(job.mesh):
        model = jobs.model(job)
        tokenizer = jobs.load_tokenizer(job, model)
        _, heldout = buckets.prompts_for(job, model, tokenizer, 24)
        compiled = stage.programs(job)
        sampler = compiled["rollout"]

        def draw(*arguments):
            told.append("draw")
            return sampler.function(*arguments)

        def ask(_, rollout):
            told.append("ask")
            return np.full(rollout.logps.shape[:2], len(told), np.float32)

        compiled["rollout"] = dataclasses.replace(sampler, function=draw)
        params = {"policy": jobs.load_weights(job, job.inputs["init"], model)}
        frozen = stage.load_frozen(job, model)
        params["value"] = stage.critic(job, model, params["policy"])
        loader = candidates.prompt_loader(job, heldout, job.settings.batch_size, shuffle=False)
        seen = list(evaluation.reply(job, compiled, loader, ask)(params, frozen))
        weights = frozen["base"] | params["policy"]
        with loader.sample(job.settings.eval_batches) as stream:
            alone = [jax.device_get(sampler.function(weights, batch, job.seed, 0)) for batch in stream]
    batches = len(alone)
    assert batches > 1 and told == ["draw", *["draw", "ask"] * (batches - 1), "ask"]
    for replied, expected in zip(seen, alone, strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(replied.rollout), expected)
