"""The blend stage: what a mean of policies' weights is, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from mpo_jax import artifacts, checkpoint, recipes
from mpo_jax.errors import InputError
from mpo_jax.stages import blend, kinds
from mpo_jax.stages import job as jobs
from tests.stages.ppo_job import beside, make_job, refused, replaced

NAMES = ("sft", "dpo")


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories):
    job = make_job(tmp_path_factory.mktemp("blend"), stories)
    inputs = {"policies": [job.inputs["sft"], job.inputs["init"]]}  # of the names "sft" and "dpo"
    return beside(job, "soup", "blend", inputs=inputs, policies=NAMES)


def blended(job, folder: str, **settings):
    job = replaced(job, settings, folder=job.workdir / folder)
    with jax.set_mesh(job.mesh):
        blend.STAGE.check(job)
        summary = blend.run(job)
        model = jobs.model(job)
        like = jobs.abstract_weights(model, job.mesh)
        found = checkpoint.restore_weights(job.folder / artifacts.WEIGHTS, like)
        parts = [jobs.load_weights(job, artifact, model) for artifact in job.inputs["policies"]]
    return summary, [list(map(np.asarray, jax.tree.leaves(each))) for each in (found, *parts)]


def test_a_blend_is_the_weighted_mean_of_every_tensor(made):
    summary, (found, one, two) = blended(made, "even")
    assert summary == {"policies": {"sft": 0.5, "dpo": 0.5}}
    for mean, a, b in zip(found, one, two, strict=True):
        np.testing.assert_allclose(mean, (a.astype(np.float64) + b) / 2, atol=1e-6)
    _, (found, one, two) = blended(made, "beyond", weights=(-0.5, 1.5))
    for mean, a, b in zip(found, one, two, strict=True):
        np.testing.assert_allclose(mean, -0.5 * a.astype(np.float64) + 1.5 * b, atol=1e-6)
    _, (found, one, _) = blended(made, "whole", weights=(1.0, 0.0))
    for mean, a in zip(found, one, strict=True):
        np.testing.assert_array_equal(mean, a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0]}, r"stages\.soup\.weights: 1 of 2 policies; expected one of each"),
        ({"weights": [0.5, 0.6]}, r"stages\.soup\.weights: 1\.1 in all; expected 1"),
        ({"weights": ["a", 1.0]}, r"stages\.soup\.weights\.0: 'a'; expected a number"),
    ],
)
def test_bad_settings(made, settings, message):
    refused(made, settings, message)


def test_adapters_are_refused(made):
    config = made.config.model_copy(
        update={
            "model": made.config.model.model_copy(
                update={"lora": made.config.model.lora.model_copy(update={"rank": 4})}
            )
        }
    )
    with pytest.raises(InputError, match=r"stages\.soup\.policies: adapters of rank 4; expected whole weights"):
        blend.STAGE.check(dataclasses.replace(made, config=config))


def test_weights_of_a_flag():
    config = recipes.config()
    config.model.path, config.data.path = "MODEL", "DATA"
    config.stages.sft, config.stages.dpo = recipes.stage("sft"), recipes.stage("dpo", init="sft", pairs="split/easy")
    config.stages.soup = recipes.stage("blend", policies=NAMES, weights=("0.25,0.75",))
    assert kinds.read(config.to_dict()).stages["soup"].weights == (0.25, 0.75)
