"""The kto stage on a real tiny LLaMA: its rows, where it begins, what it learns, what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from mpo_jax import metrics
from mpo_jax.data import encode
from mpo_jax.errors import InputError
from mpo_jax.stages import buckets, kto
from tests.stages.ppo_job import beside, make_job, part, refused, replaced

SMALL = {"batch_size": 8, "steps": 6, "learning_rate": 1e-3, "eval_every": 6, "save_every": 3, "eval_batches": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories):
    job = make_job(tmp_path_factory.mktemp("kto"), stories)
    job = replaced(job, {"data.max_buckets": 1, "data.multiple": 16})
    inputs = dict.fromkeys(("init", "reference"), job.inputs["sft"]) | {"pairs": part(job.inputs["prompts"], "all")}
    return beside(job, "kto", "kto", "kto_stage", inputs, **SMALL)


def run(job, name: str, **settings):
    job = replaced(job, settings, folder=job.workdir / name)
    job.folder.mkdir(exist_ok=True)
    with jax.set_mesh(job.mesh):
        kto.STAGE.check(job)
        return kto.run(job), metrics.read(job.folder)


def test_each_reply_is_a_row_beside_one_to_another_prompt(made):
    pairs = buckets.pairs(made.inputs["pairs"])
    single = kto.labelled(pairs)
    assert len(single) == 72 and single.replies == 1 and single.label.tolist() == [1.0] * 36 + [0.0] * 36
    np.testing.assert_array_equal(single.row(3)[1], pairs.row(3)[1])
    np.testing.assert_array_equal(single.row(36 + 3)[1], pairs.row(3)[2])
    rows = kto.with_others(single, 64)
    np.testing.assert_array_equal(rows.label, single.label)
    for row in range(72):
        for found, wanted in zip(rows.row(row)[:2], single.row(row), strict=True):
            np.testing.assert_array_equal(found, wanted)
    # Here all prompts have the same two replies. Marked by their own prompt, none stands beside that prompt.
    marked = dataclasses.replace(single, tokens=single.tokens.copy())
    marked.tokens[marked.offsets[1::2]] = marked.prompt_id
    firsts = [kto.with_others(marked, 64).row(row)[2][0] for row in range(72)]
    assert (np.asarray(firsts) != marked.prompt_id).all()
    assert max(len(rows.row(row)[2]) + len(rows.row(row)[0]) for row in range(72)) <= 64
    with pytest.raises(InputError, match="all replies are to one prompt"):
        kto.with_others(encode.take(single, np.asarray([0, 36])), 64)


def test_it_begins_at_the_reference_and_learns(made):
    summary, rows = run(made, "ran")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5) and rows[0]["kl_zero"] == pytest.approx(0, abs=1e-4)
    held = summary["evaluation"]
    assert held["loss"] < 0.5 and held["chosen_reward"] > held["rejected_reward"] and summary["replies"] == 72
    _, weighted = run(made, "weighted", steps=1, desirable_weight=2.0, undesirable_weight=2.0)
    assert weighted[0]["loss"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"microbatch": 4},
            r"stages\.kto\.microbatch: 4, but the KL estimate is computed over a whole batch; expected 0",
        ),
        ({"beta": 0.0}, r"stages\.kto\.beta: 0\.0; expected above 0"),
    ],
)
def test_bad_settings(made, settings, message):
    refused(made, settings, message)
