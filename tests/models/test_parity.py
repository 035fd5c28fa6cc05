"""Random small models of every family, and a real one, enter `transformers` and our decoder; the logits must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.models import config as model_config
from mpo_jax.models import decoder, hf, hf_names

NAMES = (
    "llama",
    "llama3",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "gpt_neox_serial",
    "gpt2",
)
LENGTHS = (19, 12, 7, 1)


def torch_model(torch, settings: dict):
    """A random model of `transformers` whose logits have about unit scale, no norm or bias being trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(settings)
    model_type = settings.pop("model_type")
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise / 8)  # 1 / sqrt(width)
    return built


def rows(vocabulary: int, lengths, left: bool):
    """tokens, positions, segments i32 [B,T]: padded on the left or the right; the second half of a row is a reply."""
    length = max(lengths)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (len(lengths), length)).astype(np.int32)
    positions, segments = np.zeros((2, len(lengths), length), np.int32)
    for row, size in enumerate(lengths):
        start = length - size if left else 0
        positions[row, start : start + size] = np.arange(size)
        segments[row, start : start + size] = 1 + (np.arange(size) >= (size + 1) // 2)
    return tokens, positions, segments


def theirs(torch, model, tokens, positions, segments):
    with torch.no_grad():
        given = (torch.from_numpy(np.asarray(x, np.int64)) for x in (tokens, segments > 0, positions))
        ids, mask, places = given
        return model(input_ids=ids, attention_mask=mask, position_ids=places).logits.numpy()


def ours(config, weights):
    def run(weights, tokens, positions, segments):
        return decoder.logits(config, weights, decoder.forward(config, weights, tokens, positions, segments))

    compiled = jax.jit(run)
    return lambda *batch: np.asarray(compiled(weights, *map(jnp.asarray, batch)))


def distances(torch, model, config, weights, lengths=LENGTHS, vocabulary=None):
    """The largest difference of logits at real tokens, for rows padded right, left, and not at all; and their scale."""
    run, found = ours(config, weights), []
    vocabulary = vocabulary or config.vocab_size
    for left, sizes in ((False, lengths), (True, lengths), (False, (lengths[0],) * len(lengths))):
        tokens, positions, segments = rows(vocabulary, sizes, left)
        expected, got = theirs(torch, model, tokens, positions, segments), run(tokens, positions, segments)
        assert (got[..., config.vocab_size :] < -1e29).all()
        real = segments > 0
        found.append(float(np.abs(expected - got[..., : config.vocab_size])[real].max()))
    return found, float(expected.std())


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(torch, config_json, tmp_path, name):
    model = torch_model(torch, config_json(name))
    model.save_pretrained(tmp_path)
    config = model_config.from_folder(tmp_path)
    found, scale = distances(torch, model, config, hf.import_weights(tmp_path, config))
    assert 0.3 < scale < 3
    assert max(found) < 1e-4, found
    # The keys that hub checkpoints of before transformers 5 spell differently say the same.
    assert model_config.from_hf(config_json(name)) == config


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2"])
def test_names_of_the_bare_trunk_and_old_buffers_are_read(torch, config_json, tmp_path, name):
    from safetensors.numpy import load_file, save_file

    model = torch_model(torch, config_json(name))
    model.save_pretrained(tmp_path / "whole")
    config = model_config.from_folder(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "qwen2": "model."}[name]
    bare = {tensor.removeprefix(prefix): value for tensor, value in tensors.items()}
    old = {"gpt2": "h.{}.attn.bias", "gpt_neox": "layers.{}.attention.rotary_emb.inv_freq"}
    old["qwen2"] = "layers.{}.self_attn.rotary_emb.inv_freq"
    bare |= {old[name].format(layer): np.ones(4, np.float32) for layer in range(config.layers)}
    if config.tied_embeddings:
        bare["lm_head.weight"] = bare[{"gpt2": "wte.weight", "qwen2": "embed_tokens.weight"}[name]]
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    whole, read = (hf.import_weights(tmp_path / folder, config) for folder in ("whole", "bare"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, read))


def test_logits_of_stories_equal_transformers(torch, stories):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    config = model_config.from_folder(stories)
    found, scale = distances(torch, model, config, hf.import_weights(stories, config), lengths=(200, 57, 3))
    assert max(found) / max(scale, 1.0) < 1e-4, (found, scale)


def test_table_names_every_weight_of_the_decoder(random_model):
    for name in NAMES:
        config, weights = random_model(name)
        entries = {entry.weight for entry in hf_names.table(config).entries} | {"head/kernel"}
        flat = jax.tree_util.tree_flatten_with_path(weights)[0]
        assert entries == {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}, name


def test_unsupported_settings_are_refused(config_json):
    for change, told in (
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type: 'yarn' is not supported"),
    ):
        with pytest.raises(model_config.InputError, match=told) as caught:
            model_config.from_hf(config_json("llama") | change, source="x/config.json")
        assert str(caught.value).startswith("x/config.json: ") and "\n" not in str(caught.value)
    broken = {key: value for key, value in config_json("llama").items() if key != "hidden_size"}
    with pytest.raises(model_config.InputError, match=r"x/config.json: key 'hidden_size' is missing"):
        model_config.from_hf(broken, source="x/config.json")
