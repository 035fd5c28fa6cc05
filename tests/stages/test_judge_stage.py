"""The judge stage on an evaluation's replies: asked over HTTP, read from scores, and answered by a model of ours."""

import dataclasses
import json
import re
import sys
import traceback

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, graph, recipes, render, sharding
from mpo_jax.artifacts import POLICY, REPLIES
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation, judge_prompts, report
from mpo_jax.stages import judge, kinds
from mpo_jax.stages.job import Artifact, Job
from tests.evaluation import made
from tests.tools.judge_server import JudgeServer
from tests.tools.raw_server import RawServer, whole

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
    scores = [[line["replies"][name]["reward"] for name in ("mpo", "sft")] for line in made.rows(12)]
    won = [{("first", "second"): 1.0, ("second", "first"): 0.0}[a["verdict"], b["verdict"]]
           for a, b in zip(verdicts(job)[::2], verdicts(job)[1::2], strict=True)]  # fmt: skip
    assert won == [float(a > b) for a, b in scores]
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


def test_a_prompt_counts_by_its_text(tmp_path, stories, monkeypatch):
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

    shipped = key(rubric="summary")
    monkeypatch.setattr(judge_prompts, "_source", lambda name, read=judge_prompts._source: read(name) + " Be brief.")
    assert key(rubric="summary") != shipped, "another version of the package's prompt"
    assert key(rubric="summary", judge="reward") != key(rubric="summary")
    monkeypatch.undo()
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


KEY = "sk-distinctive-4f1c9a7e"


def finish(job: Job) -> None:
    """What the pipeline does behind a stage: its manifest, its line in stages.json."""
    entry = {"name": "evaluate", "part": "", "key": "0123456789ab"}
    manifest = {"name": job.name, "kind": "judge", "key": f"{job.name}-key", "inputs": {"evaluate": [entry]}}
    artifacts.write_json(job.folder / artifacts.CONFIG, {"stages": {}})
    artifacts.write_manifest(job.folder, manifest)
    known = json.loads((job.workdir / artifacts.STAGES_FILE).read_text())
    artifacts.write_json(job.workdir / artifacts.STAGES_FILE, known | {job.name: job.folder.name})


@pytest.mark.parametrize("refusal", [None, "400 Bad", "401 No", "500 Oh"])
def test_no_file_message_or_report_holds_a_key_that_the_judge_repeats(tmp_path, stories, monkeypatch, capfd, refusal):
    """Of the whole workdir, after the report; of standard output and error; of the error with all behind it."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def echo(connection, request):
        key = request.decode("latin-1").split("Authorization: Bearer ")[1].split("\r\n")[0]
        said = f"You sent Authorization: Bearer {key}, I {key[:15]}...\nVerdict: A"
        usage = {"prompt_tokens": key, "completion_tokens": -1}
        good = {"choices": [{"message": {"content": said, "role": key}}], "usage": usage, "id": key, "model": key}
        bad = {"error": {"message": said, "type": key, "param": key}}
        body = good if refusal is None or len(server.requests) < 4 else bad
        status = "200 OK" if body is good else refusal
        connection.sendall(whole(body, status=status, more=f"X-Request: {key}\r\n"))

    with RawServer(echo) as server:
        settings = {"base_url": server.address, "model": "m", "key_variable": "JUDGE_KEY", "attempts": 2,
                    "backoff": 0.01, "concurrency": 1}  # fmt: skip
        job = make_job(tmp_path, stories, made.rows(6), **settings)
        told = ""
        try:
            run(job)
            finish(job)
        except InputError as error:
            told = "".join(traceback.format_exception(error)) + str(error)
        assert bool(told) == (refusal is not None)
        assert all(KEY in request.decode() for request in server.requests) and len(server.requests) >= 4
    page = report.write(epath.Path(tmp_path), kinds.shown()).read_text()
    assert ('id="judge"' in page) == (refusal is None)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == artifacts.JUDGE_CACHE for path in files)
    shown = told + "".join(capfd.readouterr()) + repr([str(path) for path in files])
    for part in (KEY, KEY[:15], "4f1c9a7e"):
        assert part not in shown
        assert not [path for path in files if part.encode() in path.read_bytes()], part


def test_two_judges_and_people_stand_in_the_report_with_their_agreement(tmp_path, stories, monkeypatch, capsys):
    """`mpo report` on a run that was judged by a model, by scores, and by two people since."""
    lines = made.rows(30)
    better = {line["prompt_id"]: line["replies"]["mpo"]["reward"] > line["replies"]["sft"]["reward"] for line in lines}

    def as_rewards(first, second):
        return f"Verdict: {'A' if ('kind 1' in first) == better[int(first.split()[-1].rstrip('.'))] else 'B'}"

    with JudgeServer(as_rewards) as server:
        job = make_job(tmp_path, stories, lines, base_url=server.url, model="m-1", key_variable="")
        run(job)
        finish(job)
    other = make_job(tmp_path, stories, lines, judge="reward")
    folder = epath.Path(tmp_path) / "second"
    folder.mkdir()
    second = dataclasses.replace(other, name="second", folder=folder)
    artifacts.write_json(epath.Path(tmp_path) / artifacts.STAGES_FILE,
                         {"evaluate": "evaluate-0123456789ab", "judge": "judge"})  # fmt: skip
    run(second)
    finish(second)
    items = annotation.items(lines, [("mpo", "sft")], 0)
    with annotation.Store(tmp_path / artifacts.ANNOTATIONS) as store:
        for name, few in (("ada", items), ("bob", items[:10])):
            for item in few:
                left = better[item.prompt_id] == annotation.left_first(item, name, 0)
                store.put(annotation.judge(item, name, 0, "first" if left else "second"))
    monkeypatch.setattr(sys, "argv", ["mpo report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        render.run()
    assert ended.value.code in (0, None) and "report: " in capsys.readouterr().out
    page = " ".join((tmp_path / artifacts.REPORT_PAGE).read_text().split())
    for pair in ("judge, by m-1 and second, by the reward model", "judge, by m-1 and people",
                 "second, by the reward model and people"):  # fmt: skip
        row = page[page.index(f'<th scope="row">{pair}</th>') :].partition("</tr>")[0]
        assert re.findall(r">([^<>]+)</td>", row) == ["evaluate", "30", "100 %", "1.00 [0.51, 1.00]"], pair
    assert 'id="human"' in page and "10 comparisons judged by two or more" in page
    assert "Its verdict changed with the order on 0.0 % of the prompts" in page
    assert "Question: helpful, version " in page
