"""The judge stage on an evaluation's replies: asked over HTTP, read from scores, and answered by a model of ours."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, graph, recipes, sharding
from mpo_jax.artifacts import POLICY, REPLIES
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.stages import judge, kinds
from mpo_jax.stages.job import Artifact, Job
from tests.evaluation import made
from tests.tools.judge_server import JudgeServer

SHORT = "{{ prompt }}\nA: {{ first }}\nB: {{ second }}\n"


def make_job(folder, stories, lines, **settings) -> Job:
    made.run_folder(folder, lines)
    config = recipes.config()
    config.model.path, config.data.path = str(stories), "unread"
    config.stages.evaluate, config.stages.judge = (
        recipes.stage("evaluate"),
        recipes.stage("judge", bootstrap=200, **settings),
    )
    run = kinds.read(config.to_dict())
    workdir = epath.Path(folder)
    inputs = {
        "evaluate": Artifact("evaluate", REPLIES, workdir / "evaluate-0123456789ab"),
        "local": Artifact("base", POLICY, epath.Path(stories)),
    }
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (workdir / "judge").mkdir(exist_ok=True)
    return Job("judge", run.stages["judge"], run, workdir / "judge", workdir, inputs, mesh)


def run(job: Job):
    with jax.set_mesh(job.mesh):
        judge.check(job)
        summary = judge.run(job)
    assert json.loads((job.folder / artifacts.JUDGE_TABLE).read_text()) == json.loads(json.dumps(summary))
    return summary


def verdicts(job: Job):
    return [json.loads(line) for line in (job.folder / artifacts.VERDICTS_FILE).read_text().splitlines()]


def test_endpoint(tmp_path, stories, capsys):
    with JudgeServer(lambda first, second: "Verdict: A" if "kind 1" in first else "Verdict: B") as server:
        settings = {"base_url": server.url, "model": "m", "key_variable": "", "concurrency": 3}
        job = make_job(tmp_path, stories, made.rows(8), **settings)
        found = run(job)
        again = run(job)
    assert found["pairs"][0]["win_rate"] == 1.0 and found["pairs"][0]["left"] == "mpo"
    assert (found["calls"], found["tokens"]) == (16, 16 * 110) == (again["calls"], again["tokens"])
    assert sum(server.attempts.values()) == 16
    assert [line["verdict"] for line in verdicts(job)] == ["first", "second"] * 8
    assert "mpo preferred to sft in 100 %" in capsys.readouterr().out


def test_scores(tmp_path, stories):
    job = make_job(tmp_path, stories, made.rows(12), judge="reward")
    found = run(job)
    assert found["by"] == "the reward model" and not found["habits"]["asked"]
    with pytest.raises(InputError, match=r"judge: 'gold', but stages\.evaluate\.labeller is empty"):
        run(make_job(tmp_path, stories, made.rows(12), judge="gold"))
    with pytest.raises(InputError, match=r"stages\.judge\.judge: 'human'; expected one of endpoint, local, reward"):
        make_job(tmp_path, stories, made.rows(12), judge="human")


def test_local_policy_s_verdicts_are_its_own_probabilities(tmp_path, stories):
    """Against transformers: which of " A" and " B" with its end is the likelier after the question. Nothing cut off."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    (tmp_path / "short.jinja").write_text(SHORT)
    lines = made.rows(5, text=lambda name, number: f"The {'dog' if name == 'mpo' else 'cat'} ran {'far ' * number}.")
    lines[4]["replies"]["mpo"]["text"] = "The dog ran on. " * 200  # beyond the model's context
    job = make_job(tmp_path, stories, lines, judge="local", local="base", prompt_file=str(tmp_path / "short.jinja"))
    found = run(job)
    assert found["by"] == "base" and found["too_long"] == 2 and found["pairs"][0]["invalid_prompts"] == 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), load_tokenizer(str(stories))
    said = verdicts(job)
    assert [line["answer"] for line in said[8:]] == [None, None]
    texts = {line["prompt_id"]: {name: reply["text"] for name, reply in line["replies"].items()} for line in lines}
    for line in said[:8]:
        shown = texts[line["prompt_id"]]
        second = "sft" if line["first"] == "mpo" else "mpo"
        question = f"Question {line['prompt_id']}: why?\nA: {shown[line['first']]}\nB: {shown[second]}\nVerdict:"
        ids = [tokenizer.bos_token_id, *tokenizer(question, add_special_tokens=False).input_ids]
        logps = []
        for word in ("A", "B"):
            answer = [*tokenizer(word, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                table = torch.log_softmax(model(torch.tensor([ids + answer])).logits[0].double(), -1)
            logps.append(sum(table[len(ids) + n - 1, token].item() for n, token in enumerate(answer)))
        assert abs(logps[0] - logps[1]) > 1e-3
        assert line["verdict"] == ("first" if logps[0] > logps[1] else "second")


def test_prompt_file_counts_by_its_text(tmp_path, stories):
    """Another place is the same judge; another text is another."""
    config = recipes.config()
    config.model.path = config.data.path = str(stories)
    own = tmp_path / "own.jinja"
    own.write_text(SHORT)
    (tmp_path / "copy.jinja").write_text(SHORT)

    def key(**settings):
        config.stages = {
            "evaluate": recipes.stage("evaluate", policies=("base",), baseline="base", reward="", prompts=""),
            "judge": recipes.stage("judge", **settings),
        }
        return graph.resolve(kinds.read(config.to_dict()), epath.Path(tmp_path))["judge"].key

    first = key(prompt_file=str(own))
    assert key(prompt_file=str(tmp_path / "copy.jinja")) == first
    assert key(prompt_file=str(own), concurrency=2, max_calls=5, key_variable="OTHER") == first
    assert key(prompt_file=str(own), model="other") != first
    own.write_text(SHORT + "Be brief.")
    assert key(prompt_file=str(own)) != first
    with pytest.raises(InputError, match=r"stages\.judge\.prompt_file: .*no such file"):
        key(prompt_file=str(tmp_path / "absent.jinja"))


def test_questions_hold_no_policy_name(tmp_path, stories):
    with JudgeServer(lambda first, second: "Verdict: tie") as server:
        job = make_job(
            tmp_path, stories, made.rows(3), base_url=server.url, model="m", key_variable="", rubric="harmless"
        )
        found = run(job)
    assert not any("mpo" in text or "sft" in text for text in server.attempts)
    assert found["pairs"][0]["win_rate"] == 0.5 and np.isclose(found["habits"]["agreement"], 1)
