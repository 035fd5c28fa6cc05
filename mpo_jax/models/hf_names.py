"""A `ModelConfig` enters; the table of its Hugging Face tensors leaves: each one's name, layout and our weight's name.

One table serves import and export. A layout spells a tensor's axes by letters: v vocabulary, s positions, d width,
h heads, g key-value heads, k head_dim, f feed-forward, o one; "(h k) d" is a matrix whose rows run over heads, then
head_dim; a digit is an axis on which several of our weights lie side by side.
"""

import dataclasses

from mpo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our weights in a Hugging Face checkpoint.

    tensor: the tensor's name, with {} for the layer where the weight is stacked over layers. layout: its axes.
    weight: our name. part: the place on the layout's digit axis.
    """

    tensor: str
    layout: str
    weight: str
    part: int = 0

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """Each of the tensor's dimensions as the letters it runs over: "(h k) d" -> (("h", "k"), ("d",))."""
        inside = False
        axes: list[tuple[str, ...]] = []
        for token in self.layout.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                inside = True
                axes.append(())
            elif token == ")":
                inside = False
            elif inside:
                axes[-1] += (token,)
            else:
                axes.append((token,))
        return tuple(axes)

    @property
    def own_axes(self) -> tuple[str, ...]:
        """The axes of our weight, without the layers."""
        return weight_axes(self.weight)


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's tensors. prefix: of the trunk's names, which checkpoints of the bare trunk leave out. ignored:
    tensors (with {} for the layer) that older checkpoints hold and that are no weights. output: the output matrix,
    which may also be there where it is tied, as a copy of the embedding. architectures: the class of the language model
    and of the one-score reward model in `transformers`."""

    prefix: str
    output: str
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...]
    architectures: tuple[str, str]


HEAD = Entry("score.weight", "o d", "head/kernel")
LM_HEAD, EMBEDDING = "params/lm_head/kernel", "params/embed/embedding"

_AXES = {
    "params/embed/embedding": "v d",
    "params/lm_head/kernel": "v d",
    "params/positions/embedding": "s d",
    "head/kernel": "d o",
    "attn/q/kernel": "d h k",
    "attn/k/kernel": "d g k",
    "attn/v/kernel": "d g k",
    "attn/o/kernel": "h k d",
    "attn/q/bias": "h k",
    "attn/k/bias": "g k",
    "attn/v/bias": "g k",
    "attn/o/bias": "d",
    "attn/q_norm/scale": "k",
    "attn/k_norm/scale": "k",
    "mlp/gate/kernel": "d f",
    "mlp/up/kernel": "d f",
    "mlp/down/kernel": "f d",
    "mlp/gate/bias": "f",
    "mlp/up/bias": "f",
    "mlp/down/bias": "d",
}


def weight_axes(weight: str) -> tuple[str, ...]:
    """The letters of a weight's axes, without the layers: "params/layers/attn/q/kernel" -> d, h, k. Norms have one."""
    return tuple(_AXES.get(weight.removeprefix("params/layers/"), "d").split())


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter in a checkpoint (the vocabulary unpadded)."""
    return {
        "v": config.vocab_size,
        "s": config.max_positions,
        "d": config.width,
        "h": config.heads,
        "g": config.kv_heads,
        "k": config.head_dim,
        "f": config.mlp_width,
        "o": 1,
    }


def table(config: ModelConfig) -> Table:
    """The tensors of a model's checkpoint, the score head aside. A family that names its own as LLaMA does has none."""
    own = _OWN_NAMES.get(config.family)
    return own(config) if own else _llama(config, config.family.capitalize())


def _llama(config: ModelConfig, name: str) -> Table:
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norms:
        norms = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attn_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "post_mlp_norm",
        }
    entries = [
        _whole("model.embed_tokens.weight", "v d", "embed/embedding"),
        _whole("model.norm.weight", "d", "final_norm/scale"),
        *(_layer(f"model.layers.{{}}.{theirs}.weight", "d", f"{ours}/scale") for theirs, ours in norms.items()),
    ]
    attention = {"q": ("(h k)", "d"), "k": ("(g k)", "d"), "v": ("(g k)", "d"), "o": ("d", "(h k)")}
    for letter, (out, inputs) in attention.items():
        tensor = f"model.layers.{{}}.self_attn.{letter}_proj"
        entries.append(_layer(f"{tensor}.weight", f"{out} {inputs}", f"attn/{letter}/kernel"))
        if config.o_bias if letter == "o" else config.qkv_bias:
            entries.append(_layer(f"{tensor}.bias", out, f"attn/{letter}/bias"))
    for ours, (out, inputs) in {"gate": ("f", "d"), "up": ("f", "d"), "down": ("d", "f")}.items():
        tensor = f"model.layers.{{}}.mlp.{ours}_proj"
        entries.append(_layer(f"{tensor}.weight", f"{out} {inputs}", f"mlp/{ours}/kernel"))
        if config.mlp_bias:
            entries.append(_layer(f"{tensor}.bias", out, f"mlp/{ours}/bias"))
    if config.qk_norm:
        entries += [_layer(f"model.layers.{{}}.self_attn.{n}.weight", "k", f"attn/{n}/scale") for n in _QK_NORMS]
    ignored = ["model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    return _finish(config, name, "ForCausalLM", "model.", entries, ignored, "lm_head.weight")


def _gpt_neox(config: ModelConfig) -> Table:
    layer = "gpt_neox.layers.{}."
    entries = [
        _whole("gpt_neox.embed_in.weight", "v d", "embed/embedding"),
        *_norm("gpt_neox.final_layer_norm", _whole, "final_norm"),
        *_norm(f"{layer}input_layernorm", _layer, "attn_norm"),
        *_norm(f"{layer}post_attention_layernorm", _layer, "mlp_norm"),
        _layer(f"{layer}attention.dense.weight", "d (h k)", "attn/o/kernel"),
        _layer(f"{layer}mlp.dense_h_to_4h.weight", "f d", "mlp/up/kernel"),
        _layer(f"{layer}mlp.dense_h_to_4h.bias", "f", "mlp/up/bias"),
        _layer(f"{layer}mlp.dense_4h_to_h.weight", "d f", "mlp/down/kernel"),
        _layer(f"{layer}mlp.dense_4h_to_h.bias", "d", "mlp/down/bias"),
    ]
    fused = f"{layer}attention.query_key_value"
    # As many key-value heads as heads: the letter of a fused axis must be the same for all three.
    entries += [_layer(f"{fused}.weight", f"({x} 3 k) d", f"attn/{n}/kernel", i) for i, (n, x) in enumerate(_FUSED)]
    if config.qkv_bias:
        entries += [_layer(f"{fused}.bias", f"({x} 3 k)", f"attn/{n}/bias", i) for i, (n, x) in enumerate(_FUSED)]
        entries.append(_layer(f"{layer}attention.dense.bias", "d", "attn/o/bias"))
    ignored = [f"{layer}attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    return _finish(config, "GPTNeoX", "ForCausalLM", "gpt_neox.", entries, ignored, "embed_out.weight")


def _gpt2(config: ModelConfig) -> Table:
    layer = "transformer.h.{}."
    entries = [
        _whole("transformer.wte.weight", "v d", "embed/embedding"),
        _whole("transformer.wpe.weight", "s d", "positions/embedding"),
        *_norm("transformer.ln_f", _whole, "final_norm"),
        *_norm(f"{layer}ln_1", _layer, "attn_norm"),
        *_norm(f"{layer}ln_2", _layer, "mlp_norm"),
        *(_layer(f"{layer}attn.c_attn.weight", f"d (3 {x} k)", f"attn/{n}/kernel", i) for i, (n, x) in _PLACED),
        *(_layer(f"{layer}attn.c_attn.bias", f"(3 {x} k)", f"attn/{n}/bias", i) for i, (n, x) in _PLACED),
        _layer(f"{layer}attn.c_proj.weight", "(h k) d", "attn/o/kernel"),
        _layer(f"{layer}attn.c_proj.bias", "d", "attn/o/bias"),
        _layer(f"{layer}mlp.c_fc.weight", "d f", "mlp/up/kernel"),
        _layer(f"{layer}mlp.c_fc.bias", "f", "mlp/up/bias"),
        _layer(f"{layer}mlp.c_proj.weight", "f d", "mlp/down/kernel"),
        _layer(f"{layer}mlp.c_proj.bias", "d", "mlp/down/bias"),
    ]
    ignored = [f"{layer}attn.bias", f"{layer}attn.masked_bias"]
    return _finish(config, "GPT2", "LMHeadModel", "transformer.", entries, ignored, "lm_head.weight")


_QK_NORMS = ("q_norm", "k_norm")
_FUSED = (("q", "h"), ("k", "g"), ("v", "g"))
_PLACED = tuple(enumerate(_FUSED))

_OWN_NAMES = {"gpt_neox": _gpt_neox, "gpt2": _gpt2}


def _whole(tensor: str, layout: str, weight: str) -> Entry:
    return Entry(tensor, layout, f"params/{weight}")


def _layer(tensor: str, layout: str, weight: str, part: int = 0) -> Entry:
    return Entry(tensor, layout, f"params/layers/{weight}", part)


def _norm(tensor: str, make, weight: str) -> list[Entry]:
    return [make(f"{tensor}.weight", "d", f"{weight}/scale"), make(f"{tensor}.bias", "d", f"{weight}/bias")]


def _finish(config, name: str, lm_class: str, prefix: str, entries, ignored, lm_head: str) -> Table:
    if config.tied_embeddings:
        ignored = [*ignored, lm_head]  # some checkpoints hold a copy of the tied embedding
    else:
        entries = [*entries, Entry(lm_head, "v d", LM_HEAD)]
    return Table(prefix, lm_head, tuple(entries), tuple(ignored), (name + lm_class, f"{name}ForSequenceClassification"))
