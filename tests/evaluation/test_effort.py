"""Manifests of trainings enter; how much data each policy saw is worked out by hand."""

import json

import pytest
from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import effort, pages, report
from mpo_jax.stages import kinds


def stage(folder, name, kind, batch=0, steps=0, epochs=0.0, inputs=None, rows=(), **summary):
    place = folder / f"{name}-0123"
    place.mkdir()
    artifacts.write_json(place / artifacts.CONFIG, {"stages": {name: {"kind": kind, "batch_size": batch}}})
    entries = {role: [{"name": each, "part": ""} for each in given] for role, given in (inputs or {}).items()}
    manifest = {"name": name, "kind": kind, "key": "0123", "inputs": entries, "shared": "", "packages": {}}
    (place / artifacts.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifacts.write_manifest(place, manifest | {"summary": {"steps": steps, "epochs": epochs} | summary})


@pytest.fixture
def workdir(tmp_path):
    """DPO saw 40 of 50 pairs; PPO went twice over 16 prompts, and logged every other step."""
    folder = epath.Path(tmp_path)
    stage(folder, "sft", "sft", 10, 5, 1.0, {"init": ("base",)})
    stage(folder, "dpo", "dpo", 8, 5, 0.8, {"init": ("sft",)}, skipped=1)
    logged = [{"step": step, "updates": 2.0, "response_tokens": 100.0 * step} for step in (2, 4)]
    stage(folder, "mpo", "ppo", 8, 4, 2.0, {"init": ("dpo",), "prompts": ("split",)}, logged)
    stage(folder, "all", "dpo", 8, 5, 0.8, {"init": ("sft",)})
    stage(folder, "evaluate", "evaluate", inputs={"policies": ("sft", "dpo", "mpo", "all")})
    names = ("sft", "dpo", "mpo", "all", "evaluate")
    artifacts.write_json(folder / artifacts.STAGES_FILE, {name: f"{name}-0123" for name in names})
    return folder


def test_data_and_updates_of_a_recipe_are_those_of_its_trainings(workdir):
    (made,) = effort.section(report.finished(workdir)[0], kinds.shown())
    assert [each.stage for each in made["common"]] == ["sft"], "all rest on it"
    rows = {row["name"]: row for row in made["rows"]}
    assert list(rows) == ["dpo", "mpo", "all"]
    dpo, ppo = rows["mpo"]["trainings"]
    assert (dpo.what, dpo.rows, dpo.distinct, dpo.seen, dpo.updates, dpo.generated) == ("pairs", 50, 40, 40, 4, 0)
    assert (ppo.what, ppo.rows, ppo.distinct, ppo.seen, ppo.updates) == ("prompts", 16, 16, 32, 8)
    assert ppo.generated == 1200 and ppo.about, "of four steps two were logged, with 600 tokens"
    assert rows["mpo"]["total"] == {"distinct": 56, "seen": 72, "updates": 12, "generated": 1200}
    assert made["told"] == (
        "The policies did not learn from equal data in equal steps: distinct pairs or prompts from 40 (dpo) to 56 "
        "(mpo), pairs or prompts with repetition from 40 (dpo) to 72 (mpo), updates from 4 (dpo) to 12 (mpo) and "
        "tokens generated from 0 (dpo) to 1,200 (mpo)."
    )


def test_equal_amounts_are_called_so(workdir):
    (made,) = effort.section(report.finished(workdir)[0], kinds.shown())
    assert effort.told([row | {"total": made["rows"][0]["total"]} for row in made["rows"]]) == (
        "All policies saw the same amount of data in as many updates."
    )


def test_the_page_shows_it_and_leaves_nothing_out(workdir):
    (workdir / "evaluate-0123" / artifacts.MANIFEST).unlink()
    page = report.page(workdir, kinds.shown())
    assert page["efforts"] == [] and "efforts" not in str(page["left_out"])
    stages, _ = report.finished(workdir)
    text = pages.environment(escaped=True).get_template("effort.html").render(
        efforts=effort.section([*stages, stages[0].__class__("evaluate", workdir, {"kind": "evaluate", "inputs": {
            "policies": [{"name": name} for name in ("sft", "dpo", "mpo")]}})], kinds.shown())
    )  # fmt: skip
    assert "dpo: 40 of 50 pairs, then 16 prompts" in " ".join(text.split())
    assert 'data-label="updates">about 12<' in text and 'data-label="tokens generated">–<' in text
    assert "All of them begin with sft (50 replies, 5 updates), which the table leaves out." in text
