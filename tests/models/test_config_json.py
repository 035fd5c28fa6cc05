"""Every key of `transformers`' own config classes is changed: what we read must be the model that `transformers` makes
of it, or the key is refused by name; and what is wrongly typed, wrapped, quantised or an adapter is told in a line."""

import dataclasses
import json
import os

import pytest

from mpo_jax.errors import InputError
from mpo_jax.models import config as model_config
from mpo_jax.models import hf
from mpo_jax.models.presets import find
from tests.models.test_parity import distances, torch_model

BASE = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
BASE |= {"gpt_neox": "gpt_neox", "gpt2": "gpt2"}

# Fields of transformers' config classes that change no forward pass of a language model in evaluation.
NO_MATHS = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "pretraining_tp", "attention_dropout", "hidden_dropout", "classifier_dropout",
    "is_decoder", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn",
}  # fmt: skip
# Another value for each field that is left; with what must come along for the value to be a valid one.
CHANGED = {
    "vocab_size": {"vocab_size": 80},
    "hidden_size": {"hidden_size": 96, "num_attention_heads": 4},
    "n_embd": {"n_embd": 96},
    "intermediate_size": {"intermediate_size": 64},
    "n_inner": {"n_inner": None},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "n_layer": {"n_layer": 3},
    "num_attention_heads": {"num_attention_heads": 8},
    "n_head": {"n_head": 8},
    "num_key_value_heads": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "hidden_act": {"hidden_act": "gelu_new"},
    "hidden_activation": {"hidden_activation": "gelu"},
    "activation_function": {"activation_function": "gelu"},
    "max_position_embeddings": {"max_position_embeddings": 64},
    "n_positions": {"n_positions": 64},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "layer_norm_eps": {"layer_norm_eps": 0.1},
    "layer_norm_epsilon": {"layer_norm_epsilon": 0.1},
    "tie_word_embeddings": None,  # the other one
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "attention_bias": None,
    "mlp_bias": {"mlp_bias": True},
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "sliding_window": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
    "layer_types": {"use_sliding_window": True, "sliding_window": 5}
    | {"layer_types": ["full_attention", "sliding_attention"]},
    "use_parallel_residual": {"use_parallel_residual": False},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 100},
    "final_logit_softcapping": {"final_logit_softcapping": None},
    "attn_logit_softcapping": {"attn_logit_softcapping": None},
    "scale_attn_weights": {"scale_attn_weights": False},
    "scale_attn_by_inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "add_cross_attention": {"add_cross_attention": True},
    "use_bidirectional_attention": {"use_bidirectional_attention": True},
}
REFUSED = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "use_bidirectional_attention",
)


def fields_of(family: str) -> list[str]:
    from transformers import CONFIG_MAPPING

    return [field.name for field in dataclasses.fields(CONFIG_MAPPING[family]) if not field.name.startswith("_")]


@pytest.mark.parametrize("family", BASE)
def test_every_field_of_transformers_config_class_is_known(family):
    unknown = set(fields_of(family)) - NO_MATHS - set(CHANGED)
    assert not unknown, f"new in transformers: read them, or refuse them by name: {unknown}"


def same_logits(torch, settings, folder):
    """Whether transformers' model of these settings and ours, read from its folder, compute the same."""
    model = torch_model(torch, settings)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": written["architectures"]}))
    config = model_config.from_folder(folder)
    found, _ = distances(torch, model, config, hf.import_weights(folder, config), lengths=(19, 7))
    assert max(found) < 2e-4, found
    return config


@pytest.mark.parametrize("family", BASE)
def test_a_changed_field_is_read_as_transformers_reads_it_or_refused(torch, config_json, tmp_path, family):
    settings = config_json(BASE[family])
    before = model_config.from_hf(settings)
    for field in fields_of(family):
        if field in NO_MATHS:
            continue
        change = CHANGED[field]
        if change is None:
            change = {field: not settings.get(field, before.tied_embeddings if "tie" in field else before.qkv_bias)}
        if field in REFUSED:
            with pytest.raises(InputError, match=field):
                model_config.from_hf(settings | change)
            continue
        if family == "gpt_neox" and field == "rope_parameters":
            change = {"rope_parameters": change["rope_parameters"] | {"partial_rotary_factor": 0.5}}
        config = same_logits(torch, settings | change, tmp_path / field)
        assert config != before, field


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"num_key_value_heads": "absent", "num_attention_heads": 8, "hidden_size": 64}),
        ("mistral", {"sliding_window": "absent"}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"attention_bias": True, "mlp_bias": True}),  # not read there
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),  # nor this
        ("gemma2", {"num_key_value_heads": "absent"}),
        ("gemma2", {"hidden_act": "silu", "mlp_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": "absent", "max_window_layers": 0}),
        ("qwen2", {"layer_types": ["full_attention", "full_attention"]}),
        ("qwen2", {"layer_types": ["attention", "full_attention"]}),
        ("qwen3", {"attention_bias": True, "head_dim": 16}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "default"}}),
        ("llama", {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 99.0}}),
        ("llama", {"rope_theta": 123, "rope_parameters": {"rope_type": "default", "rope_theta": 77}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        ("llama", {"residual_multiplier": 0.5, "logits_scaling": 8, "num_experts": 4, "sliding_window": 4}),  # unread
        ("gpt_neox", {"rope_theta": 77.0}),  # not read there, rotary_emb_base is
        ("gpt_neox", {"num_key_value_heads": 1, "rms_norm_eps": 0.5}),
        ("gpt_neox", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rotary_emb_base": 500}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt2", {"hidden_size": 96}),  # transformers lets the alias win
        ("gpt2", {"num_attention_heads": 8, "n_ctx": 7, "reorder_and_upcast_attn": True}),
    ],
)
def test_keys_that_are_absent_null_or_of_another_family_mean_what_they_mean_there(
    torch, config_json, tmp_path, name, change
):
    settings = config_json(name) | change
    same_logits(torch, {key: value for key, value in settings.items() if value != "absent"}, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers: '2'; expected an integer"),
        ("llama", {"num_hidden_layers": 2.0}, "num_hidden_layers: 2.0; expected an integer"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers: True; expected an integer"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads: 0; expected an integer of at least 1"),
        ("llama", {"num_attention_heads": [4]}, r"num_attention_heads: \[4\]; expected an integer"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false'; expected true or false"),
        ("llama", {"attention_bias": 0}, "attention_bias: 0; expected true or false"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps: '1e-5'; expected a number"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan; expected a number"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta: inf; expected a number"),
        ("llama", {"rope_theta": None}, "rope_theta: None; expected a number"),
        ("llama", {"hidden_act": 3}, "hidden_act: 3; expected text"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act: 'relu2' is not supported"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling: 'linear'; expected an object"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: '2'; expected a number"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type: 'su' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type: 'longrope' is not supported"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "'full_attention' holds an object",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: .* expected 1"),
        ("llama", {"is_causal": False}, "is_causal: False is not supported"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config: layers that differ"),
        ("llama", {"quantization": {"bits": 4, "group_size": 64}}, "quantization: the weights are quantised"),
        ("llama", {"compression_config": {"format": "dense"}}, "compression_config: the weights are quantised"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ("llama", {"model_type": None}, "model_type None is not supported"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0; expected an integer of at least 1"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window: '4096'; expected an integer"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "'sliding_attention', but use_sliding_window says"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types: 'chunked_attention' is not supported"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types: 'full_attention'; expected a list"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window: 'no'; expected true or false"),
        ("gemma2", {"sliding_window": None}, "'sliding_attention', but sliding_window says"),
        ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types: 1 entries; expected one for each of 2 layers"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping: 0.0; expected a number above 0"),
        ("gpt_neox", {"head_dim": 8}, "head_dim: expected 16"),
        ("gpt2", {"n_inner": "96"}, "n_inner: '96'; expected an integer"),
    ],
)
def test_what_is_not_read_is_refused_by_its_key(config_json, name, change, told):
    with pytest.raises(InputError, match=told) as caught:
        model_config.from_hf(config_json(name) | change, source="x/config.json")
    assert str(caught.value).startswith("x/config.json: ") and "\n" not in str(caught.value)


def write(folder, settings, name="config.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(settings if isinstance(settings, str) else json.dumps(settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}},
            "'llava' wraps its text model, under 'text_con",
        ),
        (
            {"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}},
            "wraps its text model, under 'llm_con",
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config: the",
        ),
        (
            {"model_type": "qwen2", "quantization_config": {"quant_method": "fp8"}},
            "quantization_config: the weights are",
        ),
        ("[1]", "holds a list; expected an object"),
        ("[" * 100_000, "not valid JSON"),
        ('\ufeff{"model_type": "llama"}', "not valid JSON"),
    ],
)
def test_folders_that_hold_no_plain_language_model_are_refused(tmp_path, settings, told):
    write(tmp_path / "model", settings)
    for read in (model_config.from_folder, find):
        with pytest.raises(InputError, match=told) as caught:
            read(tmp_path / "model")
        assert str(caught.value).startswith(str(tmp_path / "model" / "config.json")), caught.value
        assert "\n" not in str(caught.value)


def test_an_adapters_folder_is_refused_with_and_without_weights_beside_it(tmp_path, config_json):
    write(tmp_path, {"peft_type": "LORA"}, "adapter_config.json")
    for told in ("not a whole model's; merge it into its base", "move that file away if the weights here are whole"):
        with pytest.raises(InputError, match=told) as caught:
            model_config.from_folder(tmp_path)
        assert str(caught.value).startswith(str(tmp_path / "adapter_config.json")) and "\n" not in str(caught.value)
        write(tmp_path, config_json("llama"))


def test_a_config_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="is no regular file"):
        model_config.from_folder(tmp_path)
