"""The sft stage on a split's pairs: what it learns from, and what it is judged by."""

import jax
import numpy as np
import pytest

from mpo_jax import metrics
from mpo_jax.stages import buckets, sft
from tests.stages.ppo_job import beside, make_job


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories):
    job = make_job(tmp_path_factory.mktemp("sft"), stories)
    settings = {"batch_size": 8, "epochs": 2.0, "learning_rate": 1e-3, "eval_batches": 2}
    inputs = {"init": job.inputs["sft"], "pairs": job.inputs["prompts"]}
    return beside(job, "sft_hard", "sft", inputs=inputs, pairs="split/hard", **settings)


def test_it_learns_the_chosen_replies_of_a_part(made, monkeypatch):
    met, loader = [], sft.jobs.loader

    def recorded(job, encoded, *args, **options):
        met.append(encoded)
        return loader(job, encoded, *args, **options)

    monkeypatch.setattr(sft.jobs, "loader", recorded)
    made.folder.mkdir(exist_ok=True)
    with jax.set_mesh(made.mesh):
        summary = sft.run(made)
    for encoded, pairs in zip(
        met, (buckets.pairs(made.inputs["pairs"]), buckets.heldout(made.inputs["pairs"], "select")), strict=True
    ):
        assert encoded.replies == 1 and encoded.id.tolist() == pairs.id.tolist()
        for row in range(len(pairs)):
            for found, wanted in zip(encoded.row(row), pairs.row(row)[:2], strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert len(met[0]) == 24 and summary["steps"] == 6
    losses = [value for _, value in metrics.curve(made.folder, "loss")]
    assert losses[-1] < losses[0]
    assert sft.rows_read(made, 1000, 0.25) == 1000 * dict(made.config.data.shares)["policy"] * 0.75
