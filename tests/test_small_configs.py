"""The configs of a single stage enter, as a user starts them on the model that comes with the package; they run to
their end, on data of one's own and without any stage that is not needed."""

import json
import os
import subprocess
import sys

import pytest

from mpo_jax import artifacts
from tests.tools import kills
from tests.tools.processes import ENVIRONMENT, ROOT
from tests.tools.small_graph import write_rows

LENGTHS = ["--config.data.max_length=96", "--config.data.max_response=16", "--config.data.max_buckets=1"]
TRAINED = ["batch_size=8", "steps=2", "eval_batches=1"]
SAMPLED = ["max_new_tokens=8"]
RUNS = {
    "sft": ({"sft": TRAINED}, "demonstrations"),
    "reward": ({"reward": TRAINED}, "pairs"),
    "dpo": ({"dpo": TRAINED}, "pairs"),
    "kto": ({"kto": TRAINED}, "labelled"),
    "ppo": ({"ppo": [*TRAINED, *SAMPLED, "eval_prompts=8"]}, "prompts"),
    "ppo:reward": ({"reward": TRAINED, "ppo": [*TRAINED, *SAMPLED, "eval_prompts=8"]}, "pairs"),
    "sample": ({"sample": [*SAMPLED, "batch_size=8", "count=16"]}, "prompts"),
}
"""Config -> its stages with settings for a few steps, and what the data holds."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Config -> its workdir, and what came of its command."""
    folder = tmp_path_factory.mktemp("small")
    write_rows(folder / "pairs.jsonl")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for name, columns in (("demonstrations", ("prompt", "chosen")), ("prompts", ("prompt",))):
        lines = [json.dumps({column: row[column] for column in columns}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    labelled = [
        json.dumps({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}) + "\n"
        for number, row in enumerate(rows)
        for side in (("rejected", "chosen")[number % 2],)  # none has a counterpart
    ]
    (folder / "labelled.jsonl").write_text("".join(labelled))
    places = {name: folder / name.replace(":", "_") for name in RUNS}
    commands = [
        {
            "arguments": [
                "run",
                f"--config={name}",
                f"--workdir={places[name]}",
                f"--config.data.path={folder / data}.jsonl",
                *LENGTHS,
                *(f"--config.stages.{stage}.{each}" for stage, changes in stages.items() for each in changes),
            ]
        }
        for name, (stages, data) in RUNS.items()
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.commands"],
        cwd=ROOT, env=os.environ | ENVIRONMENT, input=json.dumps(commands).encode(), stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return dict(zip(RUNS, zip(places.values(), json.loads(done.stdout.splitlines()[-1]), strict=True), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_a_single_stage_runs_on_data_of_one_s_own(runs, name):
    workdir, done = runs[name]
    assert done["code"] == 0, done["output"][-3000:]
    assert list(json.loads((workdir / artifacts.STAGES_FILE).read_text())) == list(RUNS[name][0]), "no other stage"
    for stage in RUNS[name][0]:
        manifest = artifacts.read_manifest(kills.folder(workdir, stage))
        assert {account["share"] for account in manifest["data"]} <= {"sft_reward", "policy", "select", "report"}
        assert all(account["read"] == 240 for account in manifest["data"])
        if stage != "sample":
            assert manifest["summary"]["steps"] == 2 and manifest["summary"]["compiles_after_warmup"] == 0


def test_dpo_on_the_data_learns_from_the_policy_share_and_is_judged_on_the_held_out(runs):
    """At the first step policy and reference are the base model: the loss is log 2."""
    workdir, _ = runs["dpo"]
    manifest = artifacts.read_manifest(kills.folder(workdir, "dpo"))
    assert [account["share"] for account in manifest["data"]] == ["policy", "select", "report"]
    assert manifest["summary"]["pairs"] == manifest["data"][0]["share_records"]
    first = json.loads((kills.folder(workdir, "dpo") / artifacts.METRICS).read_text().split("\n")[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_kto_learns_from_single_replies_that_the_data_labels(runs):
    """Ethayarajh et al. 2024, eq. 8: before the first step every reply's loss is 1 - sigmoid(0)."""
    workdir, _ = runs["kto"]
    summary = artifacts.read_manifest(kills.folder(workdir, "kto"))["summary"]
    first = json.loads((kills.folder(workdir, "kto") / artifacts.METRICS).read_text().split("\n")[0])
    assert first["loss"] == pytest.approx(0.5, abs=1e-5) and 150 < summary["replies"] < 240


def test_ppo_on_the_data_begins_at_kl_0(runs):
    workdir, _ = runs["ppo"]
    first = json.loads((kills.folder(workdir, "ppo") / artifacts.METRICS).read_text().split("\n")[0])
    assert first["kl"] == pytest.approx(0.0, abs=1e-4)


def test_sampling_alone_leaves_a_reply_to_every_prompt(runs):
    workdir, _ = runs["sample"]
    lines = (kills.folder(workdir, "sample") / artifacts.REPLIES_FILE).read_text().splitlines()
    assert len(lines) == 16 and all(json.loads(line)["replies"]["base"]["text"] for line in lines)


def test_pairs_have_to_be_brought():
    command = [sys.executable, "-m", "tests.tools.main", "--config=dpo", "--workdir=nowhere", "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    told = "error: data.path: empty; expected the data: a file or folder, here or at gs://, tfds:name or a hub name\n"
    assert (done.returncode, done.stderr) == (1, told)
