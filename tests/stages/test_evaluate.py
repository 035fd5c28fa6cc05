"""The evaluate stage on a real tiny LLaMA: what it writes is what transformers says of the very replies it keeps."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts
from mpo_jax.artifacts import POLICY
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.models import hf
from mpo_jax.scorers import sentiment
from mpo_jax.stages import candidates, evaluate
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact, Job
from tests.stages.ppo_job import beside, make_job, part, refused, replaced

HEAT = 0.8


def evaluation(folder, stories, **settings) -> Job:
    """An evaluation of a policy and its baseline, their inputs as those of a ppo stage."""
    job = make_job(folder, stories)
    names = {"policies": ("dpo", "sft"), "baseline": "sft", "reward": "reward", "prompts": "split/all"}
    small = {"count": 12, "max_new_tokens": 12, "temperature": HEAT, "labeller": "vader", "batch_size": 8}
    inputs = {"policies": [job.inputs["init"], job.inputs["sft"]], "reward": job.inputs["reward"],
              "prompts": part(job.inputs["prompts"], "all")}  # fmt: skip
    # What the policies were trained as, for their frontier.
    for name, kind in (("dpo", "dpo"), ("sft", "sft")):
        job = beside(job, name, kind)
    job = beside(job, "evaluate", "evaluate", inputs=inputs, **(names | small | settings))
    job.folder.mkdir(exist_ok=True)
    return job


@pytest.fixture(scope="module")
def ran(tmp_path_factory, stories):
    job = evaluation(tmp_path_factory.mktemp("evaluate"), stories)
    with jax.set_mesh(job.mesh):
        summary = evaluate.run(job)
    lines = [json.loads(line) for line in (job.folder / artifacts.REPLIES_FILE).read_text().splitlines()]
    return job, summary, json.loads((job.folder / artifacts.REPORT).read_text()), lines


def test_files_hold_every_reply_and_its_scores(ran):
    _, summary, report, lines = ran
    assert len(lines) == report["prompts"] == 12 and len({line["prompt_id"] for line in lines}) == 12
    assert list(lines[0]["replies"]) == list(report["policies"]) == ["dpo", "sft"]
    for name, means in report["policies"].items():
        replies = [line["replies"][name] for line in lines]
        assert means["tokens"] == pytest.approx(np.mean([reply["tokens"] for reply in replies]))
        assert means["reward"] == pytest.approx(np.mean([reply["reward"] for reply in replies]), abs=1e-5)
        gold = sentiment.vader([], [reply["text"] for reply in replies])
        np.testing.assert_allclose([reply["gold"] for reply in replies], gold, atol=1e-6)
        assert set(means) == {"tokens", "finished", "repetition", "kl", "kl_error", "reward", "gold", "distinct"}
    assert summary["policies"] == report["policies"]
    assert report["policies"]["sft"]["kl"] == pytest.approx(0, abs=1e-5)
    assert report["policies"]["dpo"]["kl"] > 0


def test_kl_is_that_of_transformers(ran, stories, tmp_path):
    """Both policies in transformers: the mean of their log-probabilities' difference over the replies of one."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    job, _, report, lines = ran
    model, tokenizer = jobs.model(job), load_tokenizer(str(stories))
    prompts = evaluate.heldout_prompts(job, model, tokenizer)
    found = {}
    with jax.set_mesh(job.mesh):
        for artifact in job.inputs["policies"]:
            weights = jobs.load_weights(job, artifact, model)
            hf.export_weights(tmp_path / artifact.name, model, weights, str(stories))
            found[artifact.name] = AutoModelForCausalLM.from_pretrained(tmp_path / artifact.name)
            if artifact.name == "dpo":
                how = candidates.of_settings(job, 1)
                sample = evaluate.programs(job)["sample"]
                drawn = candidates.sample_all(job, sample, weights, prompts, how, 4)
    assert [texts[0] for texts in drawn.texts(tokenizer)] == [line["replies"]["dpo"]["text"] for line in lines]
    differences = []
    for row, (reply,) in enumerate(drawn.tokens):
        prompt = prompts.row(row)[0]
        whole = torch.tensor(np.concatenate([prompt, reply]))[None].long()
        with torch.no_grad():
            table = [torch.log_softmax(found[name](whole).logits[0].double() / HEAT, -1) for name in ("dpo", "sft")]
        places = range(len(prompt), whole.shape[1])
        differences.append(sum((table[0] - table[1])[n - 1, whole[0, n]].item() for n in places))
    assert report["policies"]["dpo"]["kl"] == pytest.approx(np.mean(differences), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"top_p": 0.9, "top_k": 40}, "top_k 40, top_p 0.9"), ({"temperature": 0.0}, "temperature 0")],
)
def test_of_a_truncated_distribution_it_gives_no_kl(tmp_path, stories, settings, told):
    job = evaluation(tmp_path, stories, count=4, labeller="", **settings)
    with jax.set_mesh(job.mesh):
        evaluate.run(job)
    report = json.loads((job.folder / artifacts.REPORT).read_text())
    assert report["truncation"] == told and report["frontier"] == {}
    for means in report["policies"].values():
        assert "log_ratio" in means and not {"kl", "kl_error"} & set(means)
    shown = evaluate.table(report)
    assert "log-ratio to sft" in shown and "KL to" not in shown and f"no KL: replies were drawn with {told}" in shown


def test_comparisons_follow_the_scores(ran):
    _, _, report, lines = ran
    assert [(c["left"], c["right"], c["by"]) for c in report["comparisons"]] == [
        ("dpo", "sft", "the gold labeller"),
        ("dpo", "sft", "the reward model"),
    ]
    for key, comparison in zip(("gold", "reward"), report["comparisons"], strict=True):
        pairs = [(line["replies"]["dpo"][key], line["replies"]["sft"][key]) for line in lines]
        assert comparison["win_rate"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
        assert comparison["low"] <= comparison["win_rate"] <= comparison["high"]
    shown = evaluate.table(report)
    assert "KL to sft" in shown and "wins by gold" in shown and all(len(line) <= 80 for line in shown.split("\n"))
    assert report["verdict"]["name"] == "dpo" and " ".join(shown.split()).endswith(report["verdict"]["sentences"][-1])
    for name, errors in report["errors"].items():
        scores = [line["replies"][name]["gold"] for line in lines]
        assert errors["gold"] == pytest.approx(np.std(scores, ddof=1) / len(scores) ** 0.5)


def test_frontier_is_of_every_policy_and_along_ppo(ran, tmp_path):
    job, _, report, _ = ran
    assert {name: len(points) for name, points in report["frontier"].items()} == {"dpo": 1, "sft": 1}
    means = report["policies"]
    assert report["frontier"]["dpo"] == [{"kl": means["dpo"]["kl"], "score": means["dpo"]["reward"]}]
    row = {"step": 2, "eval/kl_sft": 1.5, "eval/kl": 0.5, "eval/score": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "score": 0.1}) + "\n" + json.dumps(row) + "\n")
    artifact = Artifact("mpo", POLICY, epath.Path(tmp_path))
    along = replaced(job, {"stages.mpo.sft": "sft"}, inputs=job.inputs | {"policies": [artifact]})
    found = evaluate.frontier(along, {"mpo": {"kl": 2.0, "reward": 0.5}})
    assert found == {"mpo": [{"step": 2, "kl": 1.5, "score": 0.25}, {"kl": 2.0, "score": 0.5}]}
    other = replaced(along, {"stages.mpo.scorer": "vader"})  # another score
    assert evaluate.frontier(other, {"mpo": {"kl": 2.0, "reward": 0.5}}) == {"mpo": [{"kl": 2.0, "score": 0.5}]}
    assert evaluate.frontier(along, {"mpo": {"reward": 0.5}}) == {}


def test_repetition_and_diversity_by_hand():
    assert evaluate.repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)
    assert evaluate.repetition(np.array([1, 2, 3])) == 0
    assert evaluate.distinct([np.array([1, 2, 3]), np.array([1, 2])], 2) == pytest.approx(2 / 3)
    assert evaluate.distinct([np.array([1])], 2) == 0


def test_killed_after_one_policy_loads_and_samples_the_other_alone(ran, tmp_path, monkeypatch):
    """As after kill -9: the shards of one policy lie there, nothing else does."""
    job = ran[0]
    target = tmp_path / "evaluate"
    first = min((job.folder / artifacts.SHARDS).glob("sample-*/*.npz"), key=lambda path: path.stat().mtime).parent
    shutil.copytree(first, target / artifacts.SHARDS / first.name)
    loaded, whole = [], jobs.load_weights

    def counted(job, artifact, *args):
        loaded.append(artifact.name)
        return whole(job, artifact, *args)

    monkeypatch.setattr(jobs, "load_weights", counted)
    with jax.set_mesh(job.mesh):
        evaluate.run(dataclasses.replace(job, folder=epath.Path(target)))
    assert loaded == ["dpo", "sft", "sft", "reward"]  # dpo for its replies' log-probs alone, sft as the baseline too
    drawn = {path.parent.name for path in (target / artifacts.SHARDS).glob("sample-*/*.npz")}
    assert len(drawn) == 2 and first.name in drawn
    for name in (artifacts.REPLIES_FILE, artifacts.REPORT):
        assert (target / name).read_text() == (job.folder / name).read_text()


def test_baseline_that_is_no_policy(ran):
    refused(ran[0], {"baseline": "mpo"}, r"stages\.evaluate\.baseline: 'mpo' is none of dpo, sft")
