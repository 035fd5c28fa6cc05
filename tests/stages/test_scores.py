"""Scorers of every kind in whole stages: a graph is run, changed, broken, run again; PPO learns from what is scored."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from mpo_jax import artifacts, graph, metrics, pipeline, recipes, sharding, states
from mpo_jax.errors import InputError
from mpo_jax.stages import kinds
from tests.tools import reward_models
from tests.tools.scorer_server import ScorerServer
from tests.tools.small_graph import write_rows

FUNCTIONS = """
import json, os

def happy(prompts, replies, records):
    with open(os.environ["ASKED"], "a") as file:
        for row in zip(prompts, replies, records):
            file.write(json.dumps(row) + "\\n")
    return [float(sum(map(len, reply.split(" ")))) for reply in replies]

def half(prompts, replies, records):
    return [float(len(reply)) if len(prompt) % 2 else None for prompt, reply in zip(prompts, replies)]

def never(prompts, replies, records):
    return [None] * len(replies)
"""
FEW = {"batch_size": 8, "steps": 2, "eval_batches": 1, "eval_every": 2, "save_every": 2}
PPO = FEW | {"init": "base", "reference": "base", "reward": "", "prompts": "split/all", "max_new_tokens": 8,
             "inner_epochs": 1, "eval_prompts": 8, "learning_rate": 1e-3}  # fmt: skip


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The module's name; its file is ASKED's neighbour."""
    (tmp_path / "judges_of_a_test.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.jsonl"))
    return "python:judges_of_a_test"


def make_config(stories, folder, **stages):
    """A split by VADER, which needs no reward model, and what is given beside it."""
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl")
    config = recipes.config()
    config.model.path, config.data.path = str(stories), str(folder / "rows.jsonl")
    config.data.limit = 120
    config.data.max_length, config.data.max_response, config.data.max_prompt = 96, 16, 64
    config.data.max_buckets = 1
    config.stages.split = recipes.stage("split", policy="", reward="", scorer="vader", quantile=0.5, batch_size=8)
    config.stages.update(stages)
    return config


def run(config, folder):
    """The graph's nodes, all of them made."""
    read = kinds.read(config.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    nodes = pipeline.run(read, epath.Path(folder / "run"), mesh)
    assert {status.state for status in states.statuses(read, nodes).values()} == {states.DONE}
    return nodes


def steps_of(node):
    return [line for line in metrics.read(node.folder) if "score" in line]


def test_ppo_learns_from_a_function_that_is_told_of_the_records(stories, tmp_path, functions, capfd):
    """Its scores are on the host's text; a changed function makes the stage again, from the first step."""
    name = f"{functions}:happy"
    config = make_config(stories, tmp_path, mpo=recipes.stage("ppo", scorer=name, normalise_scores=True, **PPO))
    node = run(config, tmp_path)["mpo"]
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    given = {row["prompt"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    for prompt, _, record in asked:
        assert record["prompt"] in given and record["chosen"] == given[record["prompt"]]["chosen"]
        assert prompt.split() == record["prompt"].split()
    assert len({(prompt, reply) for prompt, reply, _ in asked}) == len(asked), "nothing is asked twice"
    lines = steps_of(node)
    assert len(lines) == 2 and all(line["unscored"] == 0 for line in lines)
    kept = artifacts.read_json(node.folder / artifacts.STATISTICS)
    first = [float(sum(map(len, reply.split(" ")))) for _, reply, _ in asked[: kept["of"]]]
    assert (kept["mean"], kept["std"]) == pytest.approx((np.mean(first), np.std(first)), rel=1e-5)
    assert f"mpo: scores have mean {kept['mean']:.4g}" in capfd.readouterr().out
    again = run(config, tmp_path)["mpo"]
    assert again.key == node.key and "mpo: done before" in capfd.readouterr().out
    source = tmp_path / "judges_of_a_test.py"
    source.write_text(source.read_text() + "\n# changed\n")
    changed = graph.resolve(kinds.read(config.to_dict()), epath.Path(tmp_path / "run"))
    assert changed["mpo"].key != node.key and changed["split"].key == run(config, tmp_path)["split"].key


def test_prompts_without_a_score_teach_nothing_and_are_counted(stories, tmp_path, functions):
    """Where nothing has a score, no weight moves: neither by moments nor by decay."""
    some = recipes.stage("ppo", scorer=f"{functions}:half", **PPO)
    none = recipes.stage(
        "ppo", scorer={f"{functions}:never": 2.0, "vader": 1.0}, weight_decay=0.1, kl_target=1.0, **PPO
    )
    nodes = run(make_config(stories, tmp_path, some=some, none=none), tmp_path)
    shares = [line["unscored"] for line in steps_of(nodes["some"])]
    assert 0 < np.mean(shares) < 1 and all(line["updates"] == 1 for line in steps_of(nodes["some"]))
    for line in steps_of(nodes["none"]):
        assert (line["unscored"], line["updates"], line["loss"]) == (1, 0, 0)
        assert line["kl_coefficient"] == steps_of(nodes["none"])[0]["kl_coefficient"]
    (evaluated,) = [line for line in metrics.read(nodes["none"].folder) if "eval/score" in line]
    assert evaluated["eval/unscored"] == 1 and abs(evaluated["eval/kl"]) < 1e-5, "the policy is the reference still"
    assert json.loads((nodes["none"].folder / artifacts.TRAINING_SAMPLES).read_text())["replies"][0]["score"] is None


def test_a_sum_of_the_reward_model_and_others(stories, tmp_path, functions):
    """With a function's part at next to nothing, PPO's scores are the reward model's own."""
    reward = recipes.stage("reward", init="base", **FEW)
    ppo = PPO | {"reward": "reward", "samples": 2, "algorithm": "rloo"}
    plain = recipes.stage("ppo", **ppo)
    both = recipes.stage("ppo", scorer={"reward": 1.0, f"{functions}:happy": 1e-9}, **ppo)
    nodes = run(make_config(stories, tmp_path, reward=reward, plain=plain, both=both), tmp_path)
    for one, other in zip(metrics.read(nodes["plain"].folder), metrics.read(nodes["both"].folder), strict=True):
        key = "score" if "score" in one else "eval/score"
        assert other[key] == pytest.approx(one[key], abs=2e-4)
        if key == "eval/score":
            assert other["eval/reward_score"] == pytest.approx(one[key], abs=2e-4)


def test_ppo_by_a_model_of_another_tokenizer(stories, tmp_path):
    folder = reward_models.make(tmp_path / "model", "qwen2")
    scored = {"scorer": f"hf:{folder}", "gold": f"hf:{folder}", "samples": 2, "algorithm": "rloo"}
    config = make_config(stories, tmp_path, mpo=recipes.stage("ppo", **(PPO | scored)))
    node = run(config, tmp_path)["mpo"]
    (evaluated,) = [line for line in metrics.read(node.folder) if "eval/score" in line]
    assert evaluated["eval/gold_score"] == pytest.approx(evaluated["eval/score"], abs=1e-5)
    assert all(line["score_std"] > 0.01 for line in steps_of(node))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text + "\n")
    assert graph.resolve(kinds.read(config.to_dict()), epath.Path(tmp_path / "run"))["mpo"].key != node.key
    (folder / "config.json").write_text(text)
    folder.rename(tmp_path / "elsewhere")
    config.stages.mpo.scorer = config.stages.mpo.gold = f"hf:{tmp_path / 'elsewhere'}"
    moved = graph.resolve(kinds.read(config.to_dict()), epath.Path(tmp_path / "run"))["mpo"]
    assert moved.key == node.key, "what it is counts, not where it lies"


def test_a_server_labels_pairs_and_what_it_said_before_a_break_is_kept(stories, tmp_path):
    """The run goes on behind it; another address is another scorer."""
    pairs = {"policy": "base", "batch_size": 16, "max_new_tokens": 8, "samples": 2}

    def score(prompt, reply):
        return None if len(reply) % 3 == 0 else float(len(reply))

    with ScorerServer(score, lambda number: "401" if number == 3 else None) as server:
        config = make_config(stories, tmp_path, pairs=recipes.stage("pairs", labeller=server.url, **pairs))
        config.scorers.update({"batch": 16, "concurrency": 1})
        with pytest.raises(InputError, match=r"^stages\.pairs\.labeller: 'http://.*': refused with status 401"):
            run(config, tmp_path)
        before = len(server.asked)
        assert before > 28, "all of the first share, and some of the second"
        node = run(config, tmp_path)["pairs"]
        assert len(set(server.asked)) == len(server.asked) > before
    summary = artifacts.read_manifest(node.folder)["summary"]
    assert sum(summary["unscored"].values()) > 0 and sum(summary["pairs"].values()) > 0
    with ScorerServer(score) as other:
        config.stages.pairs.labeller = other.url
        assert graph.resolve(kinds.read(config.to_dict()), epath.Path(tmp_path / "run"))["pairs"].key != node.key


def test_evaluation_and_split_count_what_has_no_score(stories, tmp_path, functions):
    half = f"{functions}:half"
    split = recipes.stage("split", policy="", reward="", scorer=half, quantile=0.5, batch_size=8)
    evaluate = recipes.stage(
        "evaluate", policies=("base",), baseline="base", reward="", prompts="", count=16, labeller=half,
        max_new_tokens=8, batch_size=8,
    )  # fmt: skip
    nodes = run(make_config(stories, tmp_path, split=split, evaluate=evaluate), tmp_path)
    summary = artifacts.read_manifest(nodes["split"].folder)["summary"]
    table = artifacts.read_gaps(nodes["split"].folder)
    assert summary["unscored"] > 0 and sum(summary["counts"].values()) == len(table.gap)
    lines = artifacts.read_lines(nodes["evaluate"].folder / artifacts.REPLIES_FILE)
    gold = [line["replies"]["base"]["gold"] for line in lines]
    means = artifacts.read_json(nodes["evaluate"].folder / artifacts.REPORT)["policies"]["base"]
    known = [value for value in gold if value is not None]
    assert means["gold_unscored"] == gold.count(None) > 0 and means["gold"] == pytest.approx(np.mean(known))


@pytest.mark.parametrize(
    ("scorer", "told"),
    [
        ("python:judges_of_a_test:nobody", "'python:judges_of_a_test:nobody': nobody is not there in judges_of_a_test"),
        ("python:no_such_module:f", "'python:no_such_module:f': no module 'no_such_module' on the path"),
        ("hf:/no/such/folder", "no such folder"),
    ],
)
def test_what_cannot_score_is_told_before_anything_runs(stories, tmp_path, functions, scorer, told):
    config = make_config(stories, tmp_path, mpo=recipes.stage("ppo", scorer=scorer, **PPO))
    with pytest.raises(InputError) as caught:
        run(config, tmp_path)
    line = str(caught.value)
    assert line.startswith("stages.mpo.scorer: ") and told in line and "\n" not in line
    assert not (tmp_path / "run").exists()
