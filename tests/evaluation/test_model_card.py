"""A finished run's stage enters; its card is read by the hub's own library, says what the run knows, and names no
folder of the machine."""

import ast
import itertools
import re

import huggingface_hub
import pytest
from etils import epath

from mpo_jax import artifacts
from mpo_jax.evaluation import model_card
from tests.evaluation import made

VERDICT = "mpo is better than sft."


@pytest.fixture
def run(tmp_path):
    """A run of sft, mpo and an evaluation of both; gives the folder of mpo."""
    workdir = epath.Path(tmp_path / "run")
    source = {"path": "/home/somebody/data/pairs.jsonl"}
    stages = {"sft": {"kind": "sft"}, "mpo": {"kind": "ppo", "scorer": "hf:/home/somebody/judge", "beta": 0.1}}
    account = made.account("/home/somebody/data/pairs.jsonl")
    policies = [{"name": name, "part": "", "key": "0123", "made": f"{name}-1"} for name in stages]
    inputs = {"sft": {}, "mpo": {"init": policies[:1]}, "evaluate": {"policies": policies}}
    for name, given in inputs.items():
        folder = workdir / f"{name}-0123"
        config = {"stages": stages, "data": source | {"sources": {"own": {"path": "Anthropic/hh-rlhf"}}}}
        artifacts.write_json(folder / artifacts.CONFIG, config)
        artifacts.write_json(folder / artifacts.INPUTS, given)
        if name == "evaluate":
            judged = {"name": "mpo", "sentences": [VERDICT], "against": [], "by": "the reward model"}
            made.evaluation(folder, ("sft", "mpo"), judged)
        kind = stages.get(name, {"kind": "evaluate"})["kind"]
        manifest = {"name": name, "kind": kind, "key": "0123", "inputs": given, "made": f"{name}-1", "shared": "abcd"}
        manifest |= {"packages": {"jax": "1"}, "summary": {}, "data": [account] if name == "sft" else []}
        manifest |= {"seconds": 1800.0, "devices": "2 x cpu", "commit": "0a1b2c3"}
        manifest["changed"] = {"run": {"model.path": "/home/somebody/base"}, "stage": {"epochs": 2.0, "init": "base"}}
        artifacts.write_manifest(folder, manifest)
    artifacts.write_json(workdir / artifacts.STAGES_FILE, {name: f"{name}-0123" for name in inputs})
    return workdir / "mpo-0123"


def card(folder, base, base_folder, **options):
    return model_card.text(folder, artifacts.read_manifest(folder), base, base_folder, **options)


def test_the_hub_reads_it(run, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: their own\n---\nA model.\n")
    found = huggingface_hub.ModelCard(card(run, "org/base-1B", tmp_path / "base"))
    known = found.data.to_dict()
    assert known["license"] == "other" and known["license_name"] == "their own"
    assert known["base_model"] == "org/base-1B" and known["base_model_relation"] == "finetune"
    assert known["datasets"] == ["Anthropic/hh-rlhf"] and "mpo_jax" in known["tags"]
    assert VERDICT in found.text and "| **mpo** | 0.250 ± 0.013 |" in found.text and "  sft --> mpo\n" in found.text
    assert "whose card gives its licence as `their own`" in found.text and "vllm serve FOLDER" in found.text


def test_it_names_no_folder_of_the_machine(run, tmp_path):
    text = card(run, str(tmp_path), tmp_path)
    assert "somebody" not in text and str(tmp_path) not in text and "pairs.jsonl [train]" in text
    assert "base_model:" not in text and "`scorer=hf:judge`" in text and "does not know" in text


def test_adapters_and_reward_models(run, tmp_path):
    adapter = card(run, "org/base-1B", tmp_path, adapter=True)
    assert "library_name: peft" in adapter and "--enable-lora --lora-modules mpo=FOLDER" in adapter
    head = card(run, "org/base-1B", tmp_path, head=True)
    assert "AutoModelForSequenceClassification" in head and "vllm" not in head and "reward-model" in head


@pytest.mark.parametrize(("head", "adapter", "chat"), list(itertools.product((False, True), repeat=3)))
def test_the_snippet_is_python_and_gets_an_answer(run, tmp_path, head, adapter, chat):
    if head and adapter:
        return  # which no export leaves
    (code,) = re.findall(
        r"^```python\n(.*?)^```", card(run, "org/base", tmp_path, head=head, adapter=adapter, chat=chat), re.M | re.S
    )
    ast.parse(code)
    assert ("apply_chat_template" in code) == chat and ("generate" in code) != head
    assert code.count("import AutoTokenizer") + code.count(", AutoTokenizer") == 1


def test_how_it_was_made_is_told(run, tmp_path):
    text = card(run, "org/base", tmp_path)
    assert "| `sft` | sft | `0123` | 1.00 | `epochs=2.0`, `init=base` |" in text
    assert "| `mpo` | ppo | `0123` | 1.00 | `epochs=2.0` |" in text, "what a stage rests on stands in the picture"
    assert "Seed 0, devices 2 x cpu, commit 0a1b2c3." in text and "`model.path=base`" in text
    assert "intervals are over prompts" in text


def test_a_reward_models_results_are_those_on_held_out_pairs(run, tmp_path):
    manifest = artifacts.read_manifest(run)
    report = {"accuracy": 0.66, "accuracy_se": 0.02, "pairs": 414, "baselines": {"shorter_wins": 0.48}}
    text = model_card.text(run, manifest | {"summary": {"report": report}}, "org/base", tmp_path, head=True)
    assert "The reward model is right on 0.660 ± 0.020 of 414 held-out pairs" in text and "shorter wins 0.480" in text


def test_results_of_another_making_are_not_its_own(run, tmp_path):
    manifest = artifacts.read_manifest(run) | {"made": "another"}
    assert "## Results" not in model_card.text(run, manifest, "org/base", tmp_path)
