"""The blend stage: what a mean of policies' weights is, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, recipes
from mpo_jax.models import lora
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
        ({"weights": [1.0]}, r"stages\.soup\.weights: 1 of 2 policies; expected a weight for each"),
        ({"weights": [0.5, 0.6]}, r"stages\.soup\.weights: 1\.1 in sum; expected 1"),
        ({"weights": ["a", 1.0]}, r"stages\.soup\.weights\.0: 'a'; expected a number"),
    ],
)
def test_bad_settings(made, settings, message):
    refused(made, settings, message)


def test_under_lora_the_products_are_blended(made, tmp_path):
    job = replaced(made, {"model.lora.rank": 4, "model.lora.targets": ("q", "down")}, workdir=epath.Path(tmp_path))
    model = jobs.model(job)
    adapters = []
    with jax.set_mesh(job.mesh):
        for number, artifact in enumerate(job.inputs["policies"]):
            drawn = lora.init(model, jax.random.key(number), job.mesh)
            keys = iter(jax.random.split(jax.random.key(7 + number), 9))
            drawn = jax.tree.map(lambda leaf, keys=keys: leaf + jax.random.normal(next(keys), leaf.shape), drawn)
            folder = epath.Path(tmp_path) / artifact.name
            checkpoint.save_weights(folder / artifacts.WEIGHTS, drawn)
            adapters.append(dataclasses.replace(artifact, folder=folder))
        job = dataclasses.replace(job, inputs={"policies": adapters})
        parts = [jobs.load_weights(job, artifact, model) for artifact in adapters]
        blend.STAGE.check(job)
        for shares in ((0.25, 0.75), (1.0, 0.0)):
            told = replaced(job, {"weights": shares}, folder=epath.Path(tmp_path) / f"soup{shares[0]}")
            summary = blend.run(told)
            found = checkpoint.restore_weights(told.folder / artifacts.WEIGHTS, parts[0])
            missing = whole = 0.0
            for name in ("q", "down"):
                block = "attn" if name == "q" else "mlp"
                one, two, ours = (product(each["lora"]["layers"][block][name]) for each in (*parts, found))
                wanted = shares[0] * one + shares[1] * two
                u, s, v = np.linalg.svd(wanted, full_matrices=False)  # the nearest of rank 4, in float64
                nearest = np.einsum("lik,lk,lko->lio", u[:, :, :4], s[:, :4], v[:, :4])
                np.testing.assert_allclose(ours, nearest, atol=2e-5)
                missing, whole = missing + (s[:, 4:] ** 2).sum(), whole + (s**2).sum()
            assert summary["missing"] == pytest.approx((missing / whole) ** 0.5, abs=1e-5)
            assert (summary["missing"] < 1e-5) == (shares == (1.0, 0.0))


def product(adapter) -> np.ndarray:
    """a b of every layer, f64 [L,in,out]."""
    a, b = (np.asarray(adapter[name], np.float64) for name in "ab")
    layers, rank = b.shape[:2]
    return a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)


def test_weights_of_a_flag():
    config = recipes.config()
    config.model.path, config.data.path = "MODEL", "DATA"
    config.stages.sft, config.stages.dpo = recipes.stage("sft"), recipes.stage("dpo", init="sft", pairs="split/easy")
    config.stages.soup = recipes.stage("blend", policies=NAMES, weights=("0.25,0.75",))
    assert kinds.read(config.to_dict()).stages["soup"].weights == (0.25, 0.75)
