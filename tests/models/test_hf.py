"""Hugging Face folders enter and leave; tensors must come back bit by bit, `transformers` must read what we wrote, and
what can't be read must be told in one line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpo_jax import sharding
from mpo_jax.data.tokenizer import check_vocabulary, load_tokenizer
from mpo_jax.errors import InputError
from mpo_jax.models import config as model_config
from mpo_jax.models import decoder, hf, lora, parameters

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tests" / "tools"
FAMILIES = ("llama", "llama_linear", "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "gpt2")


def read_all(folder) -> dict[str, np.ndarray]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def made(folder, settings: dict, dtype, stories, head=False):
    """A checkpoint with random bits in every tensor that the table names, and the tokenizer of stories260K."""
    folder.mkdir()
    config = model_config.from_hf(settings)
    table, random, tensors = hf.hf_names.table(config), np.random.default_rng(0), {}
    for entry in table.entries:
        for layer in range(config.layers):
            shape = hf._tensor_shape(entry, config)
            name = entry.tensor.format(layer)
            if name not in tensors:
                tensors[name] = random.standard_normal(shape, np.float32).astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, folder / name)
    return config


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_import_and_export_give_every_bit_back(config_json, stories, tmp_path, name):
    source = tmp_path / "source"
    dtype = {"llama": np.float16, "gpt_neox": ml_dtypes.bfloat16, "gemma2": ml_dtypes.bfloat16}.get(name, np.float32)
    config = made(source, config_json(name), dtype, stories)
    mesh = sharding.make_mesh(1, 4, 2)
    config = config.for_mesh(mesh)
    weights = hf.import_weights(source, config, mesh)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(weights))
    hf.export_weights(tmp_path / "out", config, weights, source, dtype=np.dtype(dtype).name, max_shard_bytes=60_000)
    expected, found = read_all(source), read_all(tmp_path / "out")
    assert set(expected) == set(found)
    assert all(same_bits(expected[tensor], found[tensor]) for tensor in expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in config_json(name)} == config_json(name)
    again = hf.import_weights(tmp_path / "out", config, mesh)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), weights, again))


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 4, 1), (8, 1, 1)])
def test_every_mesh_reads_the_same_weights(config_json, stories, tmp_path, sizes):
    for name in ("gpt_neox", "gpt2", "llama"):
        config = made(tmp_path / name, config_json(name), np.float32, stories)
        mesh = sharding.make_mesh(*sizes)
        config = config.for_mesh(mesh)
        whole, spread = hf.import_weights(tmp_path / name, config), hf.import_weights(tmp_path / name, config, mesh)
        expected = sharding.tree_shardings(whole, mesh)
        jax.tree.map(lambda leaf, placed: leaf.sharding.is_equivalent_to(placed, leaf.ndim) or 1 / 0, spread, expected)
        jax.tree.map(np.testing.assert_array_equal, whole, spread)
        assert not np.asarray(whole["params"]["embed"]["embedding"])[config.vocab_size :].any()


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_frozen_copies_are_cast_on_the_way_in(stories, dtype):
    config = dataclasses.replace(model_config.from_folder(stories), dtype=dtype)
    weights, half = hf.import_weights(stories, config), hf.import_weights(stories, config, dtype="bfloat16")
    expected = parameters.frozen_copy(config, weights, "bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b) or a.dtype == b.dtype or 1 / 0, expected, half)
    assert (half["params"]["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16) == (dtype != "float32")


def test_exported_stories_writes_the_same_story_in_transformers(torch, stories, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = model_config.from_folder(stories)
    weights = hf.import_weights(stories, config)
    hf.export_weights(tmp_path / "out", config, weights, stories)
    (tmp_path / "beside").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "beside").stat().st_mode
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 2 == hf.read_stop_ids(tmp_path / "out")[0]
    prompt, new = tokenizer("Once upon a time, there was a", return_tensors="pt").input_ids, 40
    expected = model.generate(prompt, max_new_tokens=new, do_sample=False)[0].numpy()

    size = prompt.shape[1]
    tokens, ones = jnp.asarray(prompt.numpy(), jnp.int32), jnp.ones((1, size), jnp.int32)
    positions = jnp.arange(size, dtype=jnp.int32)[None]
    prefill = jax.jit(decoder.prefill, static_argnums=(0, 5, 6))
    hidden, cache = prefill(config, weights, tokens, positions, ones, 1, new)
    layout = decoder.decode_layout(config, weights)

    @jax.jit
    def step(hidden, position, cache):
        token = jnp.argmax(decoder.logits(config, weights, hidden), axis=-1).astype(jnp.int32)
        hidden, cache = decoder.decode_step(config, layout, token, position, cache)
        return token, hidden, cache

    hidden, written = hidden[:, -1:], []
    for offset in range(new):
        token, hidden, cache = step(hidden, jnp.full((1, 1), size + offset, jnp.int32), cache)
        written.append(int(token[0, 0]))
    assert tokenizer.decode(written) == tokenizer.decode(expected[size:])
    assert written == expected[size:].tolist()


def scores_there(torch, folder, sequences):
    """What transformers scores in right-padded batches, padding and pad id its tokenizer's own."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer.pad({"input_ids": [list(map(int, ids)) for ids in sequences]}, return_tensors="pt")
    assert tokenizer.padding_side == "right"
    with torch.no_grad():
        return tokenizer, model(**batch).logits[:, 0].numpy()


def scores_here(config, weights, sequences):
    length = max(map(len, sequences))
    tokens, positions, segments = np.zeros((3, len(sequences), length), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], positions[row, : len(ids)], segments[row, : len(ids)] = ids, range(len(ids)), 1
    hidden = jax.jit(decoder.forward, static_argnums=0)(config, weights, tokens, positions, segments)
    scalars = np.asarray(decoder.scalar_head(weights, hidden))
    return np.asarray([scalars[row, len(ids) - 1] for row, ids in enumerate(sequences)])


def test_exported_reward_model_gives_the_same_scores_in_transformers(torch, stories, tmp_path):
    config = model_config.from_folder(stories)
    weights = hf.import_weights(stories, config) | jax.tree.map(lambda x: 10 * x, head_of(config))
    hf.export_weights(tmp_path / "out", config, weights, stories, head=True)
    random = np.random.default_rng(0)
    sequences = [[1, *random.integers(3, 512, size), 2] for size in (30, 3, 17, 1)]
    sequences += [[1, *random.integers(3, 512, 6), 0], [1, 2, 2], [1, *random.integers(3, 512, 9)]]
    tokenizer, there = scores_there(torch, tmp_path / "out", sequences)
    np.testing.assert_allclose(there, scores_here(config, weights, sequences), atol=1e-4)
    assert np.std(there) > 0.1
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert tokenizer("Once").input_ids[0] == 1  # the padding took nothing from what the tokenizer writes
    back = hf.import_weights(tmp_path / "out", config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), weights, back))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_reward_model_whose_only_special_token_is_eos_gets_a_new_one(torch, config_json, stories, tmp_path, name):
    """As GPT-2's: BOS, EOS and unknown are one token. The new one needs a row of its own."""
    settings = config_json(name) | {"vocab_size": 512}
    source = tmp_path / "source"
    config = made(source, settings, np.float32, stories)
    only = {"eos_token": "</s>", "bos_token": "</s>", "unk_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(only))
    weights = jax.tree.map(lambda x: x / 8, hf.import_weights(source, config)) | head_of(config)
    hf.export_weights(tmp_path / "out", config, weights, source, head=True)
    sequences = [[5, 6, 7, 2], [9, 2], [11, 300, 511, 4, 3, 2], [8, 7, 6, 5, 2]]
    tokenizer, there = scores_there(torch, tmp_path / "out", sequences)
    assert tokenizer.pad_token == hf.PAD_TOKEN and tokenizer.pad_token_id == 512
    assert model_config.from_folder(tmp_path / "out").vocab_size == 513
    np.testing.assert_allclose(there, scores_here(config, weights, sequences), atol=1e-4)


def head_of(config):
    return jax.tree.map(lambda x: x * 8, decoder.init_head(config, jax.random.key(9)))


def test_a_pad_token_that_is_a_stop_token_is_replaced(stories, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(stories / name, tmp_path / name)
    settings = json.loads((stories / "tokenizer_config.json").read_text()) | {"pad_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert hf._reward_tokenizer(str(tmp_path)).pad_token == "<s>"  # its own, and it ends nothing
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert hf.read_stop_ids(tmp_path) == (1, 2)
    assert hf._reward_tokenizer(str(tmp_path)).pad_token == hf.PAD_TOKEN


def test_adapters_must_be_merged_before_export(stories, tmp_path):
    config = dataclasses.replace(model_config.from_folder(stories), lora=model_config.LoraConfig(2, 4.0, ("q",)))
    weights = hf.import_weights(stories, config) | lora.init(config, jax.random.key(0))
    with pytest.raises(InputError, match="merge them first"):
        hf.export_weights(tmp_path / "out", config, weights, stories)
    hf.export_weights(tmp_path / "out", config, lora.merge(config, weights), stories)
    with pytest.raises(InputError, match="holds safetensors already"):
        hf.export_weights(tmp_path / "out", config, lora.merge(config, weights), stories)


# What can't be read: each told in one line that names the file and the tensor.


def told(folder, config, *parts):
    with pytest.raises(InputError) as caught:
        hf.import_weights(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def broken(stories, tmp_path):
    """A copy of stories260K, and a function that rewrites its tensors."""
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    os.chmod(folder, 0o755)
    for path in folder.iterdir():
        os.chmod(path, 0o644)
    path = folder / "model.safetensors"

    def change(edit):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return folder, path, change


Q = "model.layers.3.self_attn.q_proj.weight"


def test_bad_tensors_are_named(stories, broken):
    folder, path, change = broken
    config = model_config.from_folder(stories)
    change(lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": np.zeros((172, 64), np.float32)}))
    told(folder, config, path, "'model.layers.7.mlp.up_proj.weight' is unknown")
    change(lambda tensors: tensors.pop("model.layers.7.mlp.up_proj.weight"))
    change(lambda tensors: tensors.update({Q: np.zeros((64, 32), np.float32)}))
    told(folder, config, path, repr(Q), "(64, 32)", "expected (64, 64)")
    change(lambda tensors: tensors.update({Q: np.zeros((64, 64), np.int8)}))
    told(folder, config, path, repr(Q), "dtype I8")
    change(lambda tensors: tensors.pop(Q))
    told(folder, config, path, repr(Q), "missing", "(64, 64)")
    path.write_bytes(path.read_bytes()[:1000])
    told(folder, config, path, "can't be read as safetensors")


def test_shards_that_contradict_each_other_are_named(stories, broken):
    folder, path, _ = broken
    config = model_config.from_folder(stories)
    tensors = load_file(path)
    path.unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(tensors, folder / names[0])
    save_file({Q: tensors[Q]}, folder / names[1])
    weight_map = dict.fromkeys(tensors, names[0]) | {Q: names[1]}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    told(folder, config, folder / names[1], repr(Q), "duplicate", names[0])
    (folder / names[1]).unlink()
    told(folder, config, folder / names[1], "not found", hf.INDEX)
    (folder / hf.INDEX).write_text("{")
    told(folder, config, folder / hf.INDEX, "not valid JSON")


def test_bad_folders_are_named(stories, broken):
    folder, path, _ = broken
    config = model_config.from_folder(stories)
    path.rename(folder / "pytorch_model.bin")
    told(folder, config, folder, "pytorch_model.bin", "pickles are never loaded")
    (folder / "pytorch_model.bin").unlink()
    told(folder, config, folder, "no model.safetensors")
    (folder / "config.json").unlink()
    told(folder, config, folder / "config.json", "not found")
    told(folder / "absent", config, folder / "absent", "no such folder")
    told("some-owner/some-model", config, "some-owner/some-model", "it can't be downloaded from the hub")


def test_reward_folder_without_a_score_head_is_named(stories, broken):
    folder, path, _ = broken
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(settings))
    told(folder, model_config.from_folder(stories), path, "'score.weight' is missing")


def test_tokenizer_of_a_larger_vocabulary_is_named(stories, broken):
    folder, _, _ = broken
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": 500}
    (folder / "config.json").write_text(json.dumps(settings))
    config = model_config.from_folder(folder)
    told(folder, config, "'model.embed_tokens.weight' has shape (512, 64); expected (500, 64)")
    with pytest.raises(InputError, match="largest id is 511, the model's vocab_size 500") as caught:
        check_vocabulary(load_tokenizer(str(folder)), config.vocab_size, str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# Memory of an import.


def imported_memory(folder, *sizes) -> dict:
    run = [sys.executable, str(TOOLS / "make_llama.py"), str(folder), *map(str, sizes)]
    subprocess.run(run, check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, str(TOOLS / "import_memory.py"), str(folder)]
    out = subprocess.run(run, check=True, env=environment, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def test_import_holds_its_weights_and_little_more(tmp_path):
    small = ("--layers", 6, "--width", 512, "--mlp", 1408, "--heads", 8, "--dtype", "BF16", "--shard-bytes", 50_000_000)
    found = imported_memory(tmp_path / "model", *small)
    assert found["bytes"] > 200e6
    assert found["peak"] - found["baseline"] < 1.15 * found["bytes"], found


@pytest.mark.slow
def test_import_of_a_billion_parameters_stays_below_1_3_times_their_bytes(tmp_path):
    found = imported_memory(tmp_path / "model")
    assert found["bytes"] > 4.4e9
    assert found["peak"] <= 1.3 * found["bytes"], found
