"""The dpo stage on a real tiny LLaMA: where it begins, what it learns, its reference's log-probs, what it refuses."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, checkpoint, metrics
from mpo_jax.artifacts import POLICY
from mpo_jax.models import hf
from mpo_jax.stages import buckets, dpo
from mpo_jax.stages import job as jobs
from mpo_jax.stages import reference as references
from mpo_jax.stages.job import Artifact, Job
from tests.stages.ppo_job import beside, make_job, part, policy, refused, replaced

SMALL = {"batch_size": 8, "steps": 6, "learning_rate": 1e-3, "eval_every": 6, "save_every": 3, "eval_batches": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory, stories) -> Job:
    """A dpo stage's job whose policy begins as its reference, on all pairs of a small split."""
    job = make_job(tmp_path_factory.mktemp("dpo"), stories)
    job = replaced(job, {"data.max_buckets": 1, "data.multiple": 16})  # few programs to compile
    inputs = dict.fromkeys(("init", "reference"), job.inputs["sft"]) | {"pairs": part(job.inputs["prompts"], "all")}
    return beside(job, "dpo", "dpo", "dpo_stage", inputs, **(SMALL | {"pairs": "split/all"}))


def run(job: Job, name: str = "", inputs=None, **settings) -> tuple[dict, list[dict]]:
    """The summary and the rows of metrics.jsonl of the stage in another folder and with other settings."""
    fields = {"folder": job.workdir / name} if name else {}
    job = replaced(job, settings, inputs=job.inputs | (inputs or {}), **fields)
    job.folder.mkdir(exist_ok=True)
    with jax.set_mesh(job.mesh):
        dpo.STAGE.check(job)
        summary = dpo.run(job)
    return summary, metrics.read(job.folder)


@pytest.fixture(scope="module")
def ran(made):
    return run(made)


def test_the_first_step_is_at_the_reference(ran):
    summary, rows = ran
    first = rows[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    for name in ("chosen_reward", "rejected_reward", "reward_margin", "kl_chosen", "kl_rejected"):
        assert first[name] == pytest.approx(0, abs=1e-4)
    assert summary["pairs"] == 36 and summary["heldout_pairs"] == 12


def test_what_is_logged_and_learned(ran):
    summary, rows = ran
    names = {
        "chosen_reward", "rejected_reward", "reward_margin", "accuracy", "chosen_logps", "rejected_logps", "kl_chosen",
        "kl_rejected", "loss",
    }  # fmt: skip
    assert names <= set(rows[0]) and {f"eval/{name}" for name in names} <= set(rows[-1])
    held = summary["evaluation"]
    assert held["loss"] < np.log(2) and held["accuracy"] > 0.9 and held["reward_margin"] > 0
    assert held["reward_margin"] == pytest.approx(held["chosen_reward"] - held["rejected_reward"], abs=1e-5)
    assert held["chosen_reward"] == pytest.approx(0.1 * held["kl_chosen"], abs=1e-5)  # beta 0.1


def test_easy_and_hard_held_out_pairs_are_told_apart(made, ran):
    """Of the split's 12, a third are easy: the whole is their mean, and no bucket without pairs is told of."""
    summary, rows = ran
    for told in (summary["evaluation"], summary["judged"], {k[5:]: v for k, v in rows[-1].items() if k[:5] == "eval/"}):
        assert told["easy_share"] == pytest.approx(1 / 3) and told["hard_share"] == pytest.approx(2 / 3)
        for name in ("accuracy", "reward_margin"):
            whole = told["easy_share"] * told[f"easy_{name}"] + told["hard_share"] * told[f"hard_{name}"]
            assert told[name] == pytest.approx(whole, abs=1e-6)
        assert told["easy_reward_margin"] != told["hard_reward_margin"]
        assert not [name for name in told if name.startswith("flipped")]
    assert summary["watched_pairs"] == 12


def test_telling_easy_and_hard_apart_changes_no_number(made, ran, tmp_path):
    """Beside a split of an earlier version, which has not divided its held-out pairs."""
    split = made.inputs["pairs"]
    folder = epath.Path(tmp_path / "split")
    shutil.copytree(split.folder, folder)
    for half in ("select", "report"):
        (folder / artifacts.HELDOUT / half / artifacts.GAPS).unlink()
    summary, rows = run(made, "undivided", {"pairs": dataclasses.replace(split, folder=folder)})
    assert "easy_accuracy" not in summary["judged"]
    for before, after in zip(ran[1], rows, strict=True):
        assert {key: before[key] for key in after if key != "seconds"} == {
            k: v for k, v in after.items() if k != "seconds"
        }
    model = jobs.model(made)
    with jax.set_mesh(made.mesh):
        folders = (made.folder, made.workdir / "undivided")
        one, two = (jobs.load_weights(made, Artifact("dpo", POLICY, each), model) for each in folders)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def reference(job: Job, *rows):
    """The reference's log-probs of each set of rows, by the stage's own program."""
    return references.logps(job, dpo.programs(job)["reference"], {}, rows)


def cached(job: Job) -> set[str]:
    return {path.name for path in (job.workdir / "cache").glob("reference-*.npz")}


def test_reference_log_probs_equal_those_of_transformers(made, ran, stories, tmp_path, torch):
    from transformers import AutoModelForCausalLM

    model, rows = jobs.model(made), buckets.heldout(made.inputs["pairs"], "report")
    with jax.set_mesh(made.mesh):
        weights = jobs.load_weights(made, made.inputs["reference"], model)
        hf.export_weights(tmp_path / "reference", model, weights, str(stories))
        (found,) = reference(made, rows)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    for row in range(len(rows)):
        prompt, *replies = (ids.tolist() for ids in rows.row(row))
        for side, reply in enumerate(replies):
            with torch.no_grad():
                table = torch.log_softmax(theirs(torch.tensor([prompt + reply])).logits[0].double(), -1)
            expected = sum(table[len(prompt) + place - 1, token].item() for place, token in enumerate(reply))
            assert found[row, side] == pytest.approx(expected, abs=1e-4)


def test_reference_log_probs_are_computed_once_and_kept_under_their_key(made, ran, monkeypatch):
    before = cached(made)
    assert len(before) == 3  # the pairs and both halves of those held out
    computed, whole = [], references.rows.compute

    def counted(*args):
        computed.append(1)
        return whole(*args)

    monkeypatch.setattr(references.rows, "compute", counted)
    model, rows = jobs.model(made), buckets.pairs(made.inputs["pairs"])
    with jax.set_mesh(made.mesh):
        kept = reference(made, rows)
        assert not computed and cached(made) == before  # the reference was not even loaded
        easy = buckets.pairs(part(made.inputs["pairs"], "easy"))  # other rows
        reference(made, easy)
        assert len(computed) == 1 and len(cached(made)) == 4
        other = policy(made, "dpo", seed=1)  # another reference
        found = reference(dataclasses.replace(made, inputs=made.inputs | {"reference": other}), rows)
        assert len(computed) == 2 and len(cached(made)) == 5
        assert np.abs(found[0] - kept[0]).max() > 0.01
        again = Artifact("sft", POLICY, epath.Path(made.workdir / "again" / made.inputs["reference"].folder.name))
        checkpoint.save_weights(again.folder / artifacts.WEIGHTS, jobs.load_weights(made, other, model))
        artifacts.write_manifest(again.folder, {"made": "another time", "kind": "sft"})  # same name, made again
        remade = reference(dataclasses.replace(made, inputs=made.inputs | {"reference": again}), rows)
        assert len(computed) == 3
        np.testing.assert_array_equal(remade[0], found[0])


def test_a_reference_that_is_the_base_model_is_known_by_its_content(made, tmp_path):
    folders = []
    for content in (b"one", b"two"):
        folder = tmp_path / content.decode() / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        folders.append(folder)
    names = set()
    for folder in (*folders, folders[0]):
        job = replaced(made, {"model.path": str(folder)})
        names.add(tuple(references._identity(dataclasses.replace(job, inputs={"reference": jobs.base_artifact(job)}))))
    assert len(names) == 2


def test_resumed_after_its_half_it_ends_with_the_same_parameters(made, ran, monkeypatch):
    """As after a kill: the checkpoint of step 3 lies there, and the cached reference; nothing is computed again."""
    half = made.workdir / "half"
    shutil.copytree(made.folder, half)
    for late in (half / "checkpoints" / "last" / "6", half / artifacts.WEIGHTS):
        late.rmtree()
    monkeypatch.setattr(references.rows, "compute", None)
    resumed, _ = run(made, "half")
    assert metrics.curve(half, "loss") == metrics.curve(made.folder, "loss")
    assert resumed["evaluation"] == ran[0]["evaluation"]
    model = jobs.model(made)
    with jax.set_mesh(made.mesh):
        one, two = (jobs.load_weights(made, Artifact("dpo", POLICY, folder), model) for folder in (made.folder, half))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"objective": "ipo", "beta": 0.5}, 1.0),  # (0 - 1 / (2 beta))^2
        pytest.param({"label_smoothing": 0.25}, np.log(2), marks=pytest.mark.slow),
        pytest.param({"sft": 0.5}, None, marks=pytest.mark.slow),
    ],
    ids=["ipo", "conservative", "with an SFT term"],
)
def test_variants(made, ran, settings, first):
    _, rows = run(made, "-".join(settings), steps=1, **settings)
    start = rows[0]
    if first is not None:
        assert start["loss"] == pytest.approx(first, abs=1e-4)
    else:
        assert start["loss"] == pytest.approx(np.log(2) + 0.5 * start["chosen_nll"], abs=1e-4)
    assert start["grad_norm"] != pytest.approx(ran[1][0]["grad_norm"], rel=1e-3)


def test_its_line_stands_beside_those_of_the_runs_other_dpo_stages(made, ran):
    others = {"dpo_easy": {"pairs": 12}, "dpo_sampled": {"heldout": "other pairs"}}
    for name, differs in others.items():
        artifacts.write_manifest(made.workdir / f"{name}-0123", {"kind": "dpo", "summary": ran[0] | differs})
    folders = {name: f"{name}-0123" for name in others}
    (made.workdir / "stages.json").write_text(json.dumps(folders | {"dpo": "dpo-4567"}))
    job = dataclasses.replace(made, config=beside(made, "dpo_easy", "dpo", **SMALL).config)
    head, columns, easy, whole = dpo.table(dpo.finished(job, ran[0]["heldout"]) | {"dpo": ran[0]}, job).splitlines()
    assert head == "on held-out pairs (sft: reward accuracy 0.5 by definition)"
    assert columns.startswith("policy") and "reward accuracy" in columns
    assert easy.startswith("dpo_easy  12 of split/easy  1.000 ± 0.000")
    assert whole.startswith("dpo       36 of split/all   1.000 ± 0.000")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "kto"}, r"stages\.dpo\.objective: 'kto'; expected one of dpo, ipo, robust, "),
        ({"beta": 0.0}, r"stages\.dpo\.beta: 0.0; expected above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: 0.5; expected below 0.5"),
        ({"label_smoothing": 0.1, "objective": "ipo"}, "label_smoothing: ipo does not read it"),
        ({"sft": -1.0}, "sft: -1.0; expected 0"),
        ({"microbatch": 3}, "microbatch: 3 rows do not divide batch_size 8"),
    ],
)
def test_bad_settings(made, settings, message):
    refused(made, settings, message)
