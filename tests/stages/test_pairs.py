"""The pairs stage: a policy's own replies to the data's prompts, labelled by VADER with Bradley-Terry noise."""

import jax
import numpy as np
import pytest

from mpo_jax import metrics
from mpo_jax.artifacts import SAMPLES
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.scorers import preferences, sentiment
from mpo_jax.stages import corpus, pairs
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact
from tests.stages.ppo_job import beside, refused, replaced
from tests.stages.split_job import make_job, run_split


@pytest.fixture(scope="module")
def ran(tmp_path_factory, shared):
    """A job of all pairs of three replies, labelled without noise, and its summary."""
    settings = {"label_temperature": 0.0, "pairing": "all", "limit": 40}
    job = make_job(tmp_path_factory.mktemp("pairs"), shared, "pairs", **settings)
    with jax.set_mesh(job.mesh):
        return job, pairs.run(job)


def test_every_share_has_pairs_of_its_own_prompts(ran):
    job, summary = ran
    model, tokenizer = jobs.model(job), load_tokenizer(job.config.model.path)
    seen = set()
    assert set(summary["pairs"]) == {"sft_reward", "policy", "select", "report"}
    for share, count in summary["pairs"].items():
        found = corpus.read_rows(job.folder / share)
        own = corpus.share_prompts(job, model, tokenizer, share)
        assert len(found) == count > len(own)
        prompts = {int(number): tuple(own.row(row)[0].tolist()) for row, number in enumerate(own.prompt_id)}
        assert all(prompts[int(found.prompt_id[row])] == tuple(found.row(row)[0].tolist()) for row in range(count))
        assert not seen & set(prompts.values())
        seen |= set(prompts.values())
        assert len(set(found.id.tolist())) == count


def test_without_noise_the_label_follows_the_score(ran):
    job, summary = ran
    tokenizer = load_tokenizer(job.config.model.path)
    apart = 0
    for share in summary["pairs"]:
        found = corpus.read_rows(job.folder / share)
        for row in range(len(found)):
            texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in found.row(row)[1:]]
            chosen, rejected = sentiment.vader([], texts)
            assert chosen >= rejected and texts[0] != texts[1]
            apart += chosen > rejected
    assert apart > 10


def test_choices_are_bradley_terrys():
    """Of 4,000 choices at each gap, the first wins as often as sigmoid(gap / temperature) says."""
    for gap in (-0.3, 0.0, 0.1, 0.5):
        left = np.full(4000, gap, np.float32)
        won = preferences.first_wins(left, np.zeros_like(left), 0.2, np.arange(4000), seed=1).mean()
        expected = 1 / (1 + np.exp(-gap / 0.2))
        assert won == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))
    left = np.array([1.0, 0.0, 0.0])
    assert preferences.first_wins(left, np.array([0.0, 1.0, 0.0]), 0.0, np.arange(3), 0).tolist() == [True, False, True]


def test_a_split_reads_the_pairs_and_scores_them(ran):
    job, summary = ran
    inputs = job.inputs | {"pairs": Artifact("pairs", SAMPLES, job.folder)}
    made = beside(job, "split", "split", inputs=inputs, pairs="pairs", batch_size=8, quantile=0.5)
    whole = run_split(replaced(made, {"stages.reward.pairs": "pairs"}))
    assert len(corpus.read_rows(whole.folder / "pairs")) == summary["pairs"]["policy"]
    for half in ("select", "report"):
        assert len(corpus.read_rows(whole.folder / "heldout" / half)) == summary["pairs"][half]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, r"stages\.pairs\.samples: 1; expected 2 or more"),
        ({"labeller": "reward"}, "labeller: 'reward'; expected one of vader, hf:"),
    ],
)
def test_bad_settings(ran, changes, message):
    refused(ran[0], changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": 0.0}, "temperature: 0 is greedy"), ({"max_new_tokens": 600}, "context of 512")],
)
def test_what_the_model_cannot_sample(ran, changes, message):
    before = metrics.compiles()
    with pytest.raises(InputError, match=message) as caught, jax.set_mesh(ran[0].mesh):
        pairs.STAGE.check(replaced(ran[0], changes))
    assert "\n" not in str(caught.value) and metrics.compiles() == before
