"""Every config is a whole graph of known keys, and every key is read by something."""

import re
from pathlib import Path

import pytest

from configs import (
    curri_dpo,
    dpo,
    hh_rlhf,
    http_reward,
    iterative,
    kto,
    mix_dpo,
    ppo,
    quickstart,
    reward,
    sample,
    selective_dpo,
    sft,
    tiny_base,
    tldr,
)
from mpo_jax import graph, recipes, settings
from mpo_jax.errors import InputError
from mpo_jax.run import Run, StageSettings
from mpo_jax.settings import Section
from mpo_jax.stages import kinds

PACKAGE = Path(__file__).resolve().parent.parent / "mpo_jax"
CONFIGS = {
    "quickstart": quickstart.get_config,
    "tiny_base": tiny_base.get_config,
    "tldr": tldr.get_config,
    "tldr:dataset": lambda: tldr.get_config("dataset"),
    "tldr:debug": lambda: tldr.get_config("debug"),
    "tldr:v5e-32": lambda: tldr.get_config("v5e-32"),
    "hh_rlhf:v6e-16": lambda: hh_rlhf.get_config("v6e-16"),
    "tldr:sweep,pythia-1b": lambda: tldr.get_config("sweep,pythia-1b"),
    "tldr:debug,lora": lambda: tldr.get_config("debug,lora"),
    "hh_rlhf": hh_rlhf.get_config,
    "hh_rlhf:lora": lambda: hh_rlhf.get_config("lora"),
    "selective_dpo": selective_dpo.get_config,
    "curri_dpo": curri_dpo.get_config,
    "mix_dpo": mix_dpo.get_config,
    "iterative": iterative.get_config,
    "hh_rlhf:debug": lambda: hh_rlhf.get_config("debug"),
    "hh_rlhf:llama3-8b": lambda: hh_rlhf.get_config("llama3-8b"),
    "sft": sft.get_config,
    "reward:qwen2.5-0.5b": lambda: reward.get_config("qwen2.5-0.5b"),
    "dpo": dpo.get_config,
    "kto": kto.get_config,
    "ppo": ppo.get_config,
    "ppo:reward": lambda: ppo.get_config("reward"),
    "sample": sample.get_config,
    "http_reward": http_reward.get_config,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_graph_of_known_keys(name):
    config = CONFIGS[name]()
    config.model.path, config.data.path = config.model.path or "MODEL", config.data.path or "DATA"
    run = kinds.read(config.to_dict())
    assert sorted(graph.connections(run)) == sorted(config.stages)
    for stage in config.stages.values():
        assert set(stage) == set(kinds.KINDS[stage.kind].settings.model_fields)
    top = recipes.config()
    assert set(config) == set(top)
    for part in ("model", "data", "mesh"):
        assert set(config[part]) == set(top[part])


def test_every_role_is_a_setting_and_asks_for_what_some_kind_leaves():
    left = {kind.produces for kind in kinds.KINDS.values()}
    for name, kind in kinds.KINDS.items():
        assert kind.kind == name and kind.settings().kind == ""
        assert set(kind.roles) <= set(kind.settings.model_fields) - set(StageSettings.model_fields)
        assert {role.product for role in kind.roles.values()} <= left


def fields(section: type[Section]) -> set[str]:
    """The names of a section's settings and of those within it."""
    found = set()
    for name, field in section.model_fields.items():
        inside = field.annotation
        found |= fields(inside) if isinstance(inside, type) and issubclass(inside, Section) else {name}
    return found


def test_every_key_is_read_by_something():
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    keys = set.union(fields(Run), *(fields(kind.settings) for kind in kinds.KINDS.values()))
    unread = {key for key in keys if not re.search(rf'(\.{key}\b|"{key}")', text)}
    assert unread == set()


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


def test_adapters_learn_by_rates_ten_times_those_of_whole_weights():
    whole, adapters = tldr.get_config("debug"), tldr.get_config("debug,lora")
    assert (whole.model.lora.rank, adapters.model.lora.rank) == (0, 16)
    for name, stage in whole.stages.items():
        for rate in ("learning_rate", "value_learning_rate"):
            if rate in stage:
                assert adapters.stages[name][rate] == pytest.approx(10 * stage[rate])
    assert tldr.get_config("lora").stages.dpo.learning_rate == pytest.approx(5e-6)


@pytest.mark.parametrize("config", [tldr, hh_rlhf])
def test_a_slice_s_variant_changes_no_result(config):
    """Of what enters a key, how many prompts are sampled at a time alone, and that the same on every slice: a run goes
    on, on another."""
    usual = kinds.read(config.get_config().to_dict())
    tuned = {name: kinds.read(config.get_config(name).to_dict()) for name in recipes.SLICES}
    assert tuned.keys() == {"v5e-32", "v5p-16", "v6e-16"}
    for name, stage in usual.stages.items():
        for run in tuned.values():
            content = settings.content(run.stages[name])
            if stage.kind in ("split", "evaluate"):
                assert (content["batch_size"], stage.batch_size) == (256, 64)
                content = content | {"batch_size": 64}
            assert content == settings.content(stage)
    for name in ("sft", "dpo", "mpo"):
        assert {run.stages[name].microbatch for run in tuned.values()} <= {0, 32}
        assert all((run.stages[name].microbatch, run.stages[name].remat) != (32, "") for run in tuned.values()), (
            "something is tuned"
        )
    with pytest.raises(InputError, match="two slices, v5e-32 and v6e-16; expected one"):
        config.get_config("v6e-16,v5e-32")


def test_a_sweep_over_seeds_and_its_errors():
    stages = tldr.get_config().stages
    recipes.sweep(stages, "mpo", "seed", (0, 1, 2))
    assert [stages[f"mpo_seed_{seed}"].seed for seed in range(3)] == [0, 1, 2]
    assert "dpo" in stages and len(stages.evaluate.policies) == 7
    with pytest.raises(ValueError, match="no stage 'mpo'"):
        recipes.sweep(stages, "mpo", "seed", (0,))
    with pytest.raises(ValueError, match="has no key 'thresh'"):
        recipes.sweep(stages, "split", "thresh", (0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [("debgu", "did you mean 'debug'"), ("pythia-1b,llama3-8b", "two models"), ("x", "expected some")],
)
def test_unknown_variants_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        tldr.get_config(text)


def test_unknown_keys_of_a_stage_are_errors():
    with pytest.raises(ValueError, match="no key 'bta'; did you mean 'beta'"):
        recipes.stage("dpo", bta=0.2)
    with pytest.raises(ValueError, match="unknown kind of stage 'dp'"):
        recipes.stage("dp")


def test_rounds_are_ordinary_stages_each_on_the_policy_of_the_one_before():
    parts = {
        "split": recipes.stage("split", pair_source="sampled", threshold=2.0, seed=3),
        "dpo": recipes.stage("dpo", beta=0.2),
        "ppo": recipes.stage("ppo", prompts="split/all"),
    }
    made = recipes.rounds(2, **parts)
    assert list(made) == ["split_1", "dpo_1", "mpo_1", "split_2", "dpo_2", "mpo_2"]
    assert [(made[f"split_{n}"].policy, made[f"split_{n}"].seed, made[f"split_{n}"].threshold) for n in (1, 2)] == [
        ("sft", 3, 2.0), ("mpo_1", 4, 2.0)
    ]  # fmt: skip
    dpo, ppo = made["dpo_2"], made["mpo_2"]
    assert (dpo.init, dpo.reference, dpo.pairs, dpo.beta) == ("mpo_1", "mpo_1", "split_2/easy", 0.2)
    assert (ppo.init, ppo.reference, ppo.prompts) == ("dpo_2", "dpo_2", "split_2/all")
    config = recipes.config()
    config.model.path, config.data.path = "MODEL", "DATA"
    config.stages.update({"sft": recipes.stage("sft"), "reward": recipes.stage("reward")} | made)
    assert list(graph.connections(kinds.read(config.to_dict()))) == ["sft", "reward", *made]
    alone = recipes.rounds(2, parts["split"], parts["dpo"])
    assert list(alone) == ["split_1", "dpo_1", "split_2", "dpo_2"] and alone["split_2"].policy == "dpo_1"
