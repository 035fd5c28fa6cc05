"""What a setting says of who scores enters; it is taken, in every form that a config gives it, or refused in a line."""

import json

import pytest

from mpo_jax import recipes, settings
from mpo_jax.errors import InputError
from mpo_jax.run import as_json
from mpo_jax.scorers import names
from mpo_jax.stages import kinds

SUM = {"reward": 1.0, "python:my.module:length": -0.01, "hf:./a.model": 2}


def config(**given):
    made = recipes.config()
    made.model.path, made.data.path = "MODEL", "DATA"
    for kind in ("sft", "reward", "split", "dpo"):
        made.stages[kind] = recipes.stage(kind)
    made.stages.mpo = recipes.stage("ppo", **given)
    return made


def test_a_weighted_sum_stands_in_a_config_and_in_json_and_on_a_command_line():
    """A ConfigDict allows no dots in names, so that it holds the sum's JSON: so does a flag."""
    made = config(scorer=SUM)
    run = kinds.read(made.to_dict())
    assert run.stages["mpo"].scorer == {name: float(weight) for name, weight in SUM.items()}
    made.stages.mpo.scorer = "vader"  # as --config.stages.mpo.scorer=vader does
    assert kinds.read(made.to_dict()).stages["mpo"].scorer == "vader"
    made.stages.mpo.scorer = json.dumps(SUM)
    assert kinds.read(made.to_dict()) == run
    plain = json.loads(json.dumps(as_json(run)))
    assert kinds.read(plain, from_json=True) == run
    assert settings.replaced(run, {"stages.mpo.scorer": {"vader": 0.5}}).stages["mpo"].scorer == {"vader": 0.5}


@pytest.mark.parametrize(
    "name",
    ["reward", "vader", "hf:/a/folder", "hf:owner/model-1.5", "python:module:function", "python:a.b.c:f",
     "python:my.length", "http://127.0.0.1:8000/score", "https://host/score"],
)  # fmt: skip
def test_names_that_there_are(name):
    assert kinds.read(config(scorer=name).to_dict()).stages["mpo"].scorer == name


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("vadr", "'vadr'; expected one of reward, vader, hf:FOLDER_OR_ID, python:MODULE:FUNCTION, http://ADDRESS, "
                 "https://ADDRESS; did you mean 'vader'?"),
        ("pyton:my.module:f", "did you mean 'python:MODULE:FUNCTION'?"),
        ("hff:folder", "did you mean 'hf:FOLDER_OR_ID'?"),
        ("htp://host", "did you mean 'http"),
        ("python:f", "expected python:MODULE:FUNCTION, as in"),
        ("python:my module:f", "expected python:MODULE:FUNCTION"),
        ("hf:", "expected a folder or a hub id"),
        ("http://", "expected an address"),
        ("http://host:99999/", "expected an address"),
        ("https://me:secret@host/", "it holds credentials or a query"),
        ("https://host/score?key=1", "it holds credentials or a query"),
        ("", "''; expected one of reward"),
        ({}, "expected a name, or names with their weights"),
        ({"reward": 0.0}, "expected a weight other than 0 for 'reward'"),
        ({"reward": True}, "{'reward': True}; expected a weight other than 0"),
        ({"reward": 1.0, "vadr": 1.0}, "did you mean 'vader'?"),
        ('{"reward": 1.0', "expected a name, or names with weights as JSON"),
    ],
)  # fmt: skip
def test_what_is_refused(value, told):
    plain = config().to_dict()
    plain["stages"]["mpo"]["scorer"] = value
    with pytest.raises(InputError) as caught:
        kinds.read(plain)
    line = str(caught.value)
    assert line.startswith("stages.mpo.scorer: ") and told in line and "\n" not in line


def test_the_source_of_a_function_is_found_without_running_anything(tmp_path, monkeypatch):
    folder = tmp_path / "a_package_of_mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("1 / 0\n")
    (folder / "scores.py").write_text("2 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert names.source("python:a_package_of_mine.scores:f") == folder / "scores.py"
    before = names.identity("python:a_package_of_mine.scores:f")
    (folder / "scores.py").write_text("3 / 0\n")
    assert names.identity("python:a_package_of_mine.scores:f") != before
    for name, told in [
        ("a_package_of_mine.none:f", "no module 'a_package_of_mine.none'"),
        ("none:f", "no module 'none'"),
    ]:
        with pytest.raises(InputError, match=told):
            names.source(f"python:{name}")
