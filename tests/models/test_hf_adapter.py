"""Adapters enter and leave in PEFT's form; `peft` must read what we wrote, and we what it wrote."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax.errors import InputError
from mpo_jax.models import config as model_config
from mpo_jax.models import decoder, hf, hf_adapter, lora
from mpo_jax.models.config import LoraConfig

TOKENS = np.arange(3, 33, dtype=np.int32).reshape(2, 15)
POSITIONS = np.broadcast_to(np.arange(15, dtype=np.int32), (2, 15))


@pytest.fixture(scope="module")
def adapted(stories):
    base = model_config.from_folder(stories)
    config = dataclasses.replace(base, lora=LoraConfig(3, 5.0, ("q", "v", "o", "down")))
    weights = hf.import_weights(stories, config) | lora.init(config, jax.random.key(0))
    weights |= {"lora": jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size).reshape(x.shape)), weights["lora"])}
    return config, weights


def logits(config, weights):
    def run(weights):
        hidden = decoder.forward(config, weights, TOKENS, POSITIONS, np.ones_like(TOKENS))
        return decoder.logits(config, weights, hidden)

    return np.asarray(jax.jit(run)(weights))


def test_peft_reads_our_adapter_and_we_read_pefts(torch, stories, adapted, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    config, weights = adapted
    hf_adapter.export_adapter(tmp_path / "ours", config, weights, str(stories))
    base = AutoModelForCausalLM.from_pretrained(stories)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        there = model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    found = logits(config, weights)
    scale = max(1.0, found.std())
    np.testing.assert_allclose(there / scale, found / scale, atol=1e-4)
    plain = dataclasses.replace(config, lora=None)
    assert np.abs(found - logits(plain, {"params": weights["params"]})).max() > 0.1

    model.save_pretrained(tmp_path / "theirs")
    read = hf_adapter.read_adapter_config(tmp_path / "theirs", plain)
    assert read == config.lora
    back = hf_adapter.import_adapter(tmp_path / "theirs", dataclasses.replace(plain, lora=read))
    jax.tree.map(np.testing.assert_array_equal, back["lora"], weights["lora"])


def test_an_exported_adapter_loads_from_any_folder_with_its_tokenizer(torch, stories, adapted, tmp_path, monkeypatch):
    """As the model card says, with the base named relative to the folder that the run was started in."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoTokenizer

    config, weights = adapted
    monkeypatch.chdir(stories.parent)
    hf_adapter.export_adapter(tmp_path / "out", config, weights, stories.name)
    monkeypatch.chdir(tmp_path)
    model = peft.AutoPeftModelForCausalLM.from_pretrained("out").eval()
    with torch.no_grad():
        there = model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    found = logits(config, weights)
    scale = max(1.0, found.std())
    np.testing.assert_allclose(there / scale, found[..., : config.vocab_size] / scale, atol=1e-4)
    ids = [AutoTokenizer.from_pretrained(folder)("Once upon a time").input_ids for folder in ("out", stories)]
    assert ids[0] == ids[1]


def test_the_hub_name_of_a_base_stays_what_it_is(stories, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "resolve", lambda name: str(stories))
    monkeypatch.chdir(tmp_path)
    hf_adapter.export_adapter(tmp_path / "out", *adapted, "owner/name")
    assert json.loads((tmp_path / "out" / hf_adapter.CONFIG).read_text())["base_model_name_or_path"] == "owner/name"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"r": "3"}, "r: '3'; expected an integer"),
        ({"lora_alpha": None}, "lora_alpha: None; expected a number"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
    ],
)
def test_adapter_settings_that_change_what_it_computes_are_refused(stories, adapted, tmp_path, change, told):
    config, weights = adapted
    hf_adapter.export_adapter(tmp_path, config, weights, str(stories))
    path = tmp_path / hf_adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=told) as caught:
        hf_adapter.read_adapter_config(tmp_path, config)
    assert str(caught.value).startswith(str(path))


def test_bad_adapters_are_told_in_one_line(stories, adapted, random_model, tmp_path):
    config, weights = adapted
    hf_adapter.export_adapter(tmp_path, config, weights, str(stories))
    path = tmp_path / hf_adapter.WEIGHTS
    tensors = load_file(path)
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    for change, told in (
        ({name: np.zeros((4, 64), np.float32)}, f"{name}' has shape (4, 64); expected (3, 64)"),
        ({"stray": np.zeros(1, np.float32)}, "'stray' is unknown"),
    ):
        save_file(tensors | change, path)
        with pytest.raises(InputError) as caught:
            hf_adapter.import_adapter(tmp_path, config)
        assert told in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(InputError, match="missing"):
        hf_adapter.import_adapter(tmp_path, config)
    settings = json.loads((tmp_path / hf_adapter.CONFIG).read_text()) | {"use_dora": True}
    (tmp_path / hf_adapter.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(InputError, match="use_dora is True"):
        hf_adapter.read_adapter_config(tmp_path, config)
    fused, _ = random_model("gpt_neox")
    fused = dataclasses.replace(fused, lora=LoraConfig(2, 2.0, ("q",)))
    with pytest.raises(InputError, match="target 'q' has no module of its own in a gpt_neox model"):
        hf_adapter.export_adapter(tmp_path / "fused", fused, lora.init(fused, jax.random.key(0)), "x")
