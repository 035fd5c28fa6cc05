"""The stage graph: order, keys, and errors before anything runs."""

import json

import pytest
from etils import epath

from mpo_jax import graph, recipes
from mpo_jax.errors import InputError
from mpo_jax.stages import kinds


@pytest.fixture
def config(tmp_path):
    """A graph of the whole of MPO over a model and data that only their bytes matter of."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    config = recipes.config()
    config.model.path, config.data.path = str(model), str(data)
    config.stages.update(
        {  # declared out of order: the graph finds one in which they can run
            "evaluate": recipes.stage("evaluate"),
            "mpo": recipes.stage("ppo"),
            "dpo": recipes.stage("dpo"),
            "split": recipes.stage("split"),
            "reward": recipes.stage("reward"),
            "sft": recipes.stage("sft"),
        }
    )
    return config


def resolve(config):
    return graph.resolve(kinds.read(config.to_dict()), epath.Path("run"))


def keys(config):
    return {name: node.key for name, node in resolve(config).items()}


def changed(config, before):
    now = keys(config)
    return {name for name in now if now[name] != before[name]}


def test_every_stage_follows_its_inputs(config):
    nodes = resolve(config)
    order = list(nodes)
    assert set(order) == set(config.stages)
    assert all(order.index(source) < order.index(name) for name, node in nodes.items() for source in node.sources)
    assert nodes["mpo"].inputs["prompts"] == (("split", "hard"),)
    assert nodes["sft"].sources == []  # the base model is no stage
    assert nodes["dpo"].folder == epath.Path("run") / f"dpo-{nodes['dpo'].key}"


def test_a_changed_setting_changes_its_stage_and_what_rests_on_it(config):
    before = keys(config)
    config.stages.split.threshold = 2.0
    assert changed(config, before) == {"split", "dpo", "mpo", "evaluate"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stages.dpo.microbatch", 4),
        ("stages.mpo.log_every", 7),
        ("stages.mpo.mesh.tensor", 2),
        ("model.remat", "full"),
        ("mesh.tensor", 2),
    ],
)
def test_operational_keys_change_nothing(config, name, value):
    before = keys(config)
    *parents, leaf = name.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    part[leaf] = value
    assert changed(config, before) == set()


def test_seed_data_and_model_contents_change_all(config, tmp_path):
    before = keys(config)
    config.seed = 1
    assert changed(config, before) == set(before)
    config.seed = 0
    assert changed(config, before) == set()
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "d", "chosen": "e", "rejected": "f"}) + "\n")
    assert changed(config, before) == set(before)
    before = keys(config)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    assert changed(config, before) == set(before)


def test_a_moved_model_and_data_set_keep_their_keys(config, tmp_path):
    before = keys(config)
    config.model.path = str((tmp_path / "model").rename(tmp_path / "moved"))
    config.data.path = str((tmp_path / "pairs.jsonl").rename(tmp_path / "renamed.jsonl"))
    assert changed(config, before) == set()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dpo.pairs", "sft", "'sft' is a sft stage and leaves a policy; expected a pairs"),
        ("dpo.pairs", "split/esay", "PART one of easy, hard"),
        ("dpo.init", "stf", "no stage 'stf'; did you mean 'sft'"),
        ("dpo.init", "sft/easy", "has no parts"),
        ("dpo.kind", "dp", "unknown kind 'dp'; did you mean 'dpo'"),
        ("sft.init", "mpo", "a cycle: "),
    ],
)
def test_bad_graphs_are_one_line_errors(config, path, value, message):
    stage, key = path.split(".")
    config.stages[stage][key] = value
    with pytest.raises(InputError, match=message) as caught:
        resolve(config)
    assert "\n" not in str(caught.value)


def test_no_stage_may_be_called_base_and_none_may_be_missing(config):
    config.stages.base = recipes.stage("sft")
    with pytest.raises(InputError, match="kept for the base model"):
        resolve(config)
    config.stages = type(config.stages)()
    with pytest.raises(InputError, match="at least one stage"):
        resolve(config)


def test_needed_is_what_is_asked_for_and_all_beneath_it(config):
    nodes = graph.connections(kinds.read(config.to_dict()))
    assert graph.needed(nodes, ["dpo"]) == {"sft", "reward", "split", "dpo"}
    assert graph.needed(nodes, []) == set(nodes)
    with pytest.raises(InputError, match="no stage 'dpoo'; did you mean 'dpo'"):
        graph.needed(nodes, ["dpoo"])
