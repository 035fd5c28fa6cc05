"""Configs with named sources and mixtures enter; settings, keys and errors are checked, from a flag to the key."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from mpo_jax import graph, recipes
from mpo_jax.data.reading import KEYS
from mpo_jax.errors import InputError
from mpo_jax.run import Source, as_json
from mpo_jax.stages import kinds
from tests.tools.processes import ENVIRONMENT, ROOT


def write(path, **row) -> str:
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"} | row) + "\n")
    return str(path)


@pytest.fixture
def config(tmp_path):
    """Four stages, of which each reads data of its own, over a model that only its bytes matter of."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    config = recipes.config()
    config.model.path = str(model)
    config.data.path = write(tmp_path / "own.jsonl")
    config.data.columns.margin = "by"
    config.data.sources.a = recipes.source(path=write(tmp_path / "a.jsonl"), split="test", columns={"prompt": "ask"})
    config.data.sources.b = recipes.source(path=write(tmp_path / "b.jsonl"))
    config.stages.sft = recipes.stage("sft", data={"a": 0.7, "b": 0.3})
    config.stages.reward = recipes.stage("reward", data="b")
    config.stages.split = recipes.stage("split")
    config.stages.dpo = recipes.stage("dpo", init="base", reference="base", pairs="data", data="a")
    return config


def read(config):
    return kinds.read(config.to_dict())


def keys(config):
    return {name: node.key for name, node in graph.resolve(read(config), epath.Path("run")).items()}


def changed(config, before):
    now = keys(config)
    return {name for name in now if now[name] != before[name]}


def test_a_source_has_the_data_s_settings_where_it_gives_none(config):
    config.data.limit = 7
    sources = read(config).data.sources
    assert (sources["a"].split, sources["b"].split, sources["a"].limit) == ("test", "train", 7)
    assert (sources["a"].columns.prompt, sources["a"].columns.margin) == ("ask", "by")
    assert sources["b"].columns.prompt == ""


def test_a_run_with_sources_is_the_same_after_json(config):
    run = read(config)
    assert kinds.read(json.loads(json.dumps(as_json(run))), from_json=True) == run
    assert run.stages["sft"].data == {"a": 0.7, "b": 0.3}


def test_what_a_source_can_be_set_to_is_what_its_errors_are_told_by():
    assert set(KEYS) == set(Source.model_fields)


def test_a_source_that_a_stage_does_not_read_does_not_enter_its_key(config, tmp_path):
    before = keys(config)
    write(tmp_path / "a.jsonl", chosen="other")
    assert changed(config, before) == {"sft", "reward", "split", "dpo"}, "sft reads a, and all but dpo rest on it"
    config.stages.reward.init = config.stages.split.policy = "base"
    before = keys(config)
    write(tmp_path / "a.jsonl", chosen="another")
    assert changed(config, before) == {"sft", "dpo"}
    before = keys(config)
    write(tmp_path / "b.jsonl", chosen="another")
    assert changed(config, before) == {"sft", "reward", "split"}
    before = keys(config)
    write(tmp_path / "own.jsonl", chosen="another")
    assert changed(config, before) == {"split"}
    before = keys(config)
    config.data.sources.c = recipes.source(path="nowhere.jsonl")
    assert not changed(config, before)
    config.data.sources.b.common_prompt = True
    assert changed(config, before) == {"sft", "reward", "split"}
    before = keys(config)
    config.stages.sft.data.a = 0.6
    assert changed(config, before) == {"sft"}


def test_a_template_in_a_file_enters_the_key_by_its_text(config, tmp_path):
    file, other = tmp_path / "one.jinja", tmp_path / "two.jinja"
    file.write_text("{{ messages[0].content }}")
    other.write_text("{{ messages[0].content }}")
    config.stages.reward.init = config.stages.split.policy = "base"
    config.data.sources.a.template = str(file)
    before = keys(config)
    config.data.sources.a.template = str(other)
    assert not changed(config, before)
    other.write_text("{{ messages[-1].content }}")
    assert changed(config, before) == {"sft", "dpo"}


def test_the_run_s_own_data_need_not_be_there_where_nothing_reads_it(config):
    config.data.path = ""
    with pytest.raises(InputError, match=r"^data\.path: empty; expected the data: a file"):
        read(config)
    config.stages.split.data = "a"
    assert set(keys(config)) == {"sft", "reward", "split", "dpo"}


@pytest.mark.parametrize(
    ("stage", "data", "told"),
    [
        ("sft", "aa", "stages.sft.data: no source 'aa'; did you mean 'a'?"),
        ("sft", {"a": 0.5, "x": 0.5}, "stages.sft.data: no source 'x'; expected one of a, b"),
        ("sft", {}, "stages.sft.data: {}; expected a name, or names with their weights"),
        ("sft", {"a": 0.7, "b": -0.3}, "stages.sft.data: {'a': 0.7, 'b': -0.3}; expected a weight above 0 for 'b'"),
        ("sft", {"a": 0.0}, "stages.sft.data: {'a': 0.0}; expected a weight above 0 for 'a'"),
        ("sft", {"a": float("nan")}, "stages.sft.data: {'a': nan}; expected a weight above 0 for 'a'"),
        ("sft", {"a": True}, "stages.sft.data: {'a': True}; expected a weight above 0 for 'a'"),
        ("sft", '{"a": 0.7,', "stages.sft.data: '{\"a\": 0.7,'; expected a name, or names with weights as JSON"),
        ("split", {"a": -1.0}, "stages.split.data: {'a': -1.0}; expected a weight above 0 for 'a'"),
    ],
)
def test_what_is_told_of_a_stage_s_data(config, stage, data, told):
    plain = config.to_dict()
    plain["stages"][stage]["data"] = data
    with pytest.raises(InputError) as caught:
        kinds.read(plain)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"split": 3}, "data.sources.a.split: 3; expected a text"),
        ({"splitt": "x"}, "data.sources.a.splitt: no such setting; did you mean 'split'?"),
        ({"columns": {"promt": "x"}}, "data.sources.a.columns.promt: no such setting; did you mean 'prompt'?"),
        ({"limit": -1}, "data.sources.a.limit: -1; expected 0 or more"),
        ({"path": ""}, "data.sources: 'a' has no path; expected its data.sources.a.path"),
        (3, "data.sources.a: 3; expected names with values"),
    ],
)
def test_what_is_told_of_a_source(config, source, told):
    plain = config.to_dict()
    plain["data"]["sources"]["a"] = source if isinstance(source, int) else plain["data"]["sources"]["a"] | source
    with pytest.raises(InputError) as caught:
        kinds.read(plain)
    assert str(caught.value) == told


def test_data_that_would_not_be_read_is_told(config):
    config.stages.dpo.pairs = "split/easy"
    with pytest.raises(InputError, match=r"^stages\.dpo\.data: 'a' would not be read, since its rows come from other"):
        read(config)


def test_a_mixture_may_be_a_text_as_a_flag_gives_it(config):
    plain = config.to_dict()
    plain["stages"]["reward"]["data"] = '{"a": 1, "b": 3}'
    assert kinds.read(plain).stages["reward"].data == {"a": 1.0, "b": 3.0}


def test_data_is_a_name_of_roles_that_it_can_take_alone(config):
    config.stages.reward.pairs = "data"
    assert not graph.connections(read(config))["reward"]["pairs"]
    config.stages.dpo.init = "data"
    with pytest.raises(InputError, match=r"^stages\.dpo\.init: no stage 'data'"):
        graph.connections(read(config))
    config.stages.dpo.init = "base"
    config.stages.data = recipes.stage("sft")
    with pytest.raises(InputError, match=r"^stages\.data: the name is kept for the run's data"):
        graph.connections(read(config))


def test_unknown_keys_of_a_source_are_errors():
    with pytest.raises(InputError, match="a source has no key 'pth'; did you mean 'path'"):
        recipes.source(pth="x")


def test_flags_name_a_source_change_it_and_mix(stories, tmp_path):
    """A source's settings that its config leaves out are flags all the same."""
    file = tmp_path / "config.py"
    rows = write(tmp_path / "a.jsonl")
    file.write_text(
        "from mpo_jax import recipes\n"
        "def get_config():\n"
        "    config = recipes.config()\n"
        f"    config.model.path, config.data.path = {str(stories)!r}, {rows!r}\n"
        f"    config.data.sources.a = recipes.source(path={rows!r})\n"
        "    config.stages.sft = recipes.stage('sft')\n"
        "    config.stages.reward = recipes.stage('reward', data={'a': 1.0})\n"
        "    return config\n"
    )

    def dry(*flags):
        command = [
            sys.executable,
            "-m",
            "tests.tools.main",
            f"--config={file}",
            "--dry_run",
            "--workdir=nowhere",
            *flags,
        ]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "never run" in dry(
        "--config.stages.sft.data=a", "--config.data.sources.a.split=all", "--config.data.sources.a.columns.prompt=ask",
        "--config.data.sources.a.limit=3", "--config.data.sources.a.ignore=x,y", "--config.stages.reward.data.a=2",
    )  # fmt: skip
    assert "never run" in dry('--config.stages.sft.data={"a": 2}')
    assert dry("--config.stages.sft.data=b") == "error: stages.sft.data: no source 'b'; expected one of a\n"
    assert "data.sources.a.path: nowhere.jsonl: no such file" in dry("--config.data.sources.a.path=nowhere.jsonl")
