"""Every config is a whole graph of known keys, and every key is read by something."""

import re
from pathlib import Path

import pytest

from configs import base, hh_rlhf, quickstart, tiny_base, tldr
from mpo_jax import graph

PACKAGE = Path(__file__).resolve().parent.parent / "mpo_jax"
CONFIGS = {
    "quickstart": quickstart.get_config,
    "tiny_base": tiny_base.get_config,
    "tldr": tldr.get_config,
    "tldr:dataset": lambda: tldr.get_config("dataset"),
    "tldr:debug": lambda: tldr.get_config("debug"),
    "tldr:sweep,pythia-1b": lambda: tldr.get_config("sweep,pythia-1b"),
    "hh_rlhf": hh_rlhf.get_config,
    "hh_rlhf:debug": lambda: hh_rlhf.get_config("debug"),
    "hh_rlhf:llama3-8b": lambda: hh_rlhf.get_config("llama3-8b"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_graph_of_known_keys(name):
    config = CONFIGS[name]()
    inputs = {stage: graph._inputs(stage, config.stages) for stage in config.stages}
    assert sorted(graph._order(inputs)) == sorted(config.stages)
    for stage in config.stages.values():
        assert set(stage) - {"kind"} == set(base.KINDS[stage.kind])
    top = base.get_config()
    for part in ("model", "data", "mesh"):
        assert set(config[part]) == set(top[part])


def test_roles_and_kinds_are_those_of_the_graph():
    assert set(base.KINDS) == set(graph.ROLES)
    for kind, roles in graph.ROLES.items():
        assert set(roles) <= set(base.KINDS[kind])


def test_every_key_is_read_by_something():
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    top = base.get_config()
    keys = {key for part in ("model", "data") for key in top[part]} | {
        key for kind in base.KINDS.values() for key in kind
    }
    unread = {key for key in keys if not re.search(rf'(\.{key}\b|"{key}")', text)}
    assert unread == set()
    known = keys | set(top)
    assert set(base.OPERATIONAL) <= known, "an operational key that does not exist"


def test_the_paper_s_split_of_sampled_pairs_and_of_the_data_s():
    assert tldr.get_config().stages.split.pair_source == "sampled"
    assert tldr.get_config("dataset").stages.split.pair_source == "dataset"
    both = hh_rlhf.get_config().stages
    assert (both.split.pair_source, both.split_sampled.pair_source) == ("dataset", "sampled")


def test_a_sweep_expands_a_stage_and_what_rests_on_it():
    stages = tldr.get_config("sweep").stages
    assert {stages.split_threshold_1.threshold, stages.split_threshold_2.threshold} == {1.0, 2.0}
    assert (
        stages.mpo_threshold_2.prompts == "split_threshold_2/hard" and stages.mpo_threshold_2.init == "dpo_threshold_2"
    )
    assert stages.dpo_full.pairs == "split_threshold_1/all"  # all pairs are the same at any threshold: trained once
    assert set(stages.evaluate.policies) == {
        "sft", "dpo_threshold_1", "dpo_threshold_2", "mpo_threshold_1", "mpo_threshold_2", "dpo_full", "ppo_sft"
    }  # fmt: skip
    assert "split" not in stages and "reward" in stages


def test_a_sweep_over_seeds_and_its_errors():
    stages = tldr.get_config().stages
    base.sweep(stages, "mpo", "seed", (0, 1, 2))
    assert [stages[f"mpo_seed_{seed}"].seed for seed in range(3)] == [0, 1, 2]
    assert "dpo" in stages and len(stages.evaluate.policies) == 7
    with pytest.raises(ValueError, match="no stage 'mpo'"):
        base.sweep(stages, "mpo", "seed", (0,))
    with pytest.raises(ValueError, match="has no key 'thresh'"):
        base.sweep(stages, "split", "thresh", (0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [("debgu", "did you mean 'debug'"), ("pythia-1b,llama3-8b", "two models"), ("x", "expected some")],
)
def test_unknown_variants_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        tldr.get_config(text)


def test_unknown_keys_of_a_stage_are_errors():
    with pytest.raises(ValueError, match="no key 'bta'; did you mean 'beta'"):
        base.stage("dpo", bta=0.2)
    with pytest.raises(ValueError, match="unknown kind of stage 'dp'"):
        base.stage("dp")
