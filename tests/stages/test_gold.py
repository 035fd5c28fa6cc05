"""PPO's evaluations log a gold scorer's mean score of the very replies that they keep, at any number of samples."""

import json

import jax
import numpy as np
import pytest

from mpo_jax import artifacts, metrics
from mpo_jax.evaluation import validation
from mpo_jax.scorers import sentiment
from mpo_jax.stages.ppo import stage as ppo
from tests.stages.ppo_job import make_job


@pytest.mark.slow
def test_gold_score_is_the_scorer_s_of_the_kept_replies(tmp_path, stories):
    """Learned from VADER with two samples to a prompt, and measured by it too: score and gold are one number."""
    job = make_job(tmp_path, stories, samples=2, scorer="vader", gold="vader", table_rows=8, steps=2, inner_epochs=1)
    with jax.set_mesh(job.mesh):
        ppo.run(job)
    rows = [row for row in metrics.read(job.folder) if "eval/gold_score" in row]
    kept = [json.loads(line) for line in (job.folder / artifacts.TRAINING_SAMPLES).read_text().splitlines()]
    assert len(rows) == len(kept) >= 1
    for row, table in zip(rows, kept, strict=True):
        assert len(table["replies"]) == 8
        expected = np.mean(sentiment.vader([], [reply["reply"] for reply in table["replies"]]))
        assert row["eval/gold_score"] == pytest.approx(expected, abs=1e-5)
        assert row["eval/score"] == pytest.approx(row["eval/gold_score"], abs=1e-5)
    assert len(rows) < 2 or validation.over_optimisation(rows) is not None
