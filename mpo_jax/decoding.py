"""Takes a model's weights and left-padded prompts; gives responses in the making, a token more for each at every step,
with the log-probabilities of the very distribution they are drawn from.

Letters: B rows (a prompt each), N responses to each, P prompt slots, R response slots (max_new_tokens), V padded
vocabulary. What decides a token is its prompt's id, the sample's index and the position alone, so that rows may be
decoded in any order and beside any others.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mpo_jax import sharding
from mpo_jax.errors import InputError
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import choose
from mpo_jax.sharding import constrain
from mpo_jax.types import Batch, PyTree, record


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. temperature 0 is greedy; top_k, top_p None: no truncation (see `choose.weights`).

    n: responses to a prompt. stop_ids: a response ends with any of them, which is its last token; none of them is
    drawn before min_new_tokens. max_new_tokens: R, the stop token included. InputError for what can't be meant.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_new_tokens: int = 0
    max_new_tokens: int = 64
    n: int = 1
    stop_ids: tuple[int, ...] = ()

    @property
    def truncation(self) -> str:
        """What makes the samples those of another distribution than the softmax, in words; "" for nothing. The mean of
        log-ratios over such samples is no KL of the policy."""
        kinds = {
            "temperature 0": self.temperature == 0,
            f"top_k {self.top_k}": self.top_k is not None,
            f"top_p {self.top_p}": self.top_p is not None and self.top_p < 1,
            f"min_new_tokens {self.min_new_tokens}": self.min_new_tokens > 0,
        }
        return ", ".join(kind for kind, used in kinds.items() if used)

    def __post_init__(self):
        object.__setattr__(self, "stop_ids", tuple(sorted({int(stop) for stop in self.stop_ids})))
        if self.n < 1:
            raise InputError(f"n: {self.n}; expected at least 1 response to a prompt")
        if not math.isfinite(self.temperature) or 0 < self.temperature < 1e-3 or self.temperature < 0:
            raise InputError(f"temperature: {self.temperature}; expected 0 (greedy) or a number from 0.001 up")
        if self.temperature == 0 and self.n > 1:
            raise InputError(
                f"temperature: 0 is greedy, so n = {self.n} replies would be equal; take n = 1 or raise it"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: {self.top_k}; expected at least 1, or None for the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p}; expected above 0 and at most 1, or None for no truncation")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"min_new_tokens: {self.min_new_tokens}; expected 0 to max_new_tokens {self.max_new_tokens}"
            )

    def check(self, config: ModelConfig, prompt_len: int) -> None:
        """InputError where the model can't do this with prompts of `prompt_len` slots."""
        outside = [stop for stop in self.stop_ids if not 0 <= stop < config.vocab_size]
        if outside:
            raise InputError(f"stop_ids: {outside} outside the vocabulary; expected ids below {config.vocab_size}")
        if self.min_new_tokens and len(self.stop_ids) == config.vocab_size:
            raise InputError("min_new_tokens: every token is a stop id, so none can be drawn before it")
        if prompt_len + self.max_new_tokens > config.max_positions:
            raise InputError(
                f"max_new_tokens: {prompt_len} prompt tokens and {self.max_new_tokens} new ones are above the model's "
                f"context of {config.max_positions}; expected at most {max(config.max_positions - prompt_len, 0)}"
            )


@record
class Decoding:
    """Responses in the making. step: i32 [], tokens drawn in turn, that of the prefill being the first. drawn: i32
    [B,N,R]; logps: f32 [B,N,R]; lengths: i32 [B,N], real tokens; done, finished: bool [B,N] (finished: by a stop
    token). last: i32 [B,N], what the next step reads. uniforms: f32 [B,N,R], what decides each token. prompt_lens: i32
    [B]. decoded: i32 [], rows times steps until now.

    drawn, logps and uniforms are rings as the caches' slots are (`decoder.Cache`): a row's first token lies at
    cache.began modulo R. What a row has drawn stays when it is done, however long others go on.
    """

    step: jax.Array
    drawn: jax.Array
    logps: jax.Array
    lengths: jax.Array
    done: jax.Array
    finished: jax.Array
    last: jax.Array
    uniforms: jax.Array
    prompt_lens: jax.Array
    decoded: jax.Array
    cache: decoder.Cache


def begin(
    config: ModelConfig,
    settings: SamplingConfig,
    weights: PyTree,
    prompts: Batch,
    seed: jax.Array | int,
    round: jax.Array | int,
    slots: int,
    step: jax.Array | int = 1,
) -> Decoding:
    """Reads the prompts, once each, and draws every response's first token. weights: `decode_weights`; slots: of the
    caches, for as many tokens of a response as will be decoded in them; rows of weight 0 are done at once. step: of the
    Decoding that these rows are for."""
    rows, length = prompts.tokens.shape
    settings.check(config, length)
    hidden, cache = decoder.prefill(
        config, weights, prompts.tokens, prompts.positions, prompts.segments, settings.n, slots
    )
    step = jnp.asarray(step, jnp.int32)
    shape = (rows, settings.n)
    room = (*shape, settings.max_new_tokens)
    prompt_lens = prompts.positions[:, -1] + 1
    keys = response_keys(seed, round, prompts.prompt_id, settings.n)
    positions = prompt_lens[:, None, None] + jnp.arange(settings.max_new_tokens, dtype=jnp.int32)[None, None]
    # All of them here: in the loop, such small integer work is many short kernels a token.
    every = uniforms(jnp.broadcast_to(keys[:, :, None], room), jnp.broadcast_to(positions, room))
    state = Decoding(
        step=step - 1,
        drawn=constrain(jnp.zeros(room, jnp.int32), "batch", None, None),
        logps=constrain(jnp.zeros(room, jnp.float32), "batch", None, None),
        lengths=jnp.zeros(shape, jnp.int32),
        done=jnp.broadcast_to((prompts.weight == 0)[:, None], shape),
        finished=jnp.zeros(shape, bool),
        last=jnp.zeros(shape, jnp.int32),
        uniforms=constrain(jnp.roll(every, step - 1, axis=2), "batch", None, None),
        prompt_lens=prompt_lens,
        decoded=jnp.zeros((), jnp.int32),
        cache=dataclasses.replace(
            cache,
            layers=spread_over_heads(config, cache.layers),
            cursor=step - 1,
            began=jnp.broadcast_to(step - 1, (rows,)),
        ),
    )
    # Every response's first distribution is that of its prompt's last column; only the uniforms differ.
    logits = decoder.logits(config, weights, hidden[:, -1:])
    return _draw(settings, jnp.broadcast_to(logits, (*shape, logits.shape[-1])), state)


def spread_over_heads(config: ModelConfig, layers: PyTree) -> PyTree:
    """Caches over key-value heads, also where the axis holds them times responses."""

    def by_head(x: jax.Array) -> jax.Array:
        heads = x.reshape(x.shape[0], config.kv_heads, -1, *x.shape[2:])
        return constrain(heads, "batch", "kv_heads", None, None, None).reshape(x.shape)

    return jax.tree.map(by_head, layers)


def advance(
    config: ModelConfig,
    settings: SamplingConfig,
    layout: PyTree,
    state: Decoding,
    more: Callable[[Decoding], jax.Array],
) -> Decoding:
    """Decodes a token of every response, over and over, while `more` says so: bool []. layout: `decode_layout`."""

    def one_token(state: Decoding):
        positions = jnp.maximum(state.prompt_lens[:, None] + state.lengths - 1, 0)  # an empty row has none
        hidden, cache = decoder.decode_step(config, layout, state.last, positions, state.cache)
        products = decoder.output_products(config, hidden, layout["output"], transposed=False)
        logits = decoder.finish_logits(config, products)
        decoded = state.decoded + state.done.shape[0]
        return _draw(settings, logits, dataclasses.replace(state, cache=cache, decoded=decoded))

    return jax.lax.while_loop(more, one_token, state)


def live(state: Decoding) -> jax.Array:
    """Rows with a response that is not done, bool [B]."""
    return ~jnp.all(state.done, axis=1)


def response_keys(seed: jax.Array | int, round: jax.Array | int, prompt_id: jax.Array, n: int) -> jax.Array:
    """One key for each response, typed keys [B,N], from (seed, round, prompt id, sample index) alone."""
    key = jax.random.fold_in(jax.random.key(seed), round)

    def of_sample(prompt, index):
        return jax.random.fold_in(jax.random.fold_in(key, prompt), index)

    over_samples = jax.vmap(of_sample, in_axes=(None, 0))
    return jax.vmap(over_samples, in_axes=(0, None))(prompt_id, jnp.arange(n, dtype=jnp.int32))


def uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The uniform, f32 in [0,1), of each response's token at `positions` (i32, like keys)."""

    def of_token(key, position):
        return jax.random.uniform(jax.random.fold_in(key, position), (), jnp.float32)

    flat = jax.vmap(of_token)(keys.reshape(-1), positions.reshape(-1))
    return flat.reshape(positions.shape)


def distribution(settings: SamplingConfig, logits: jax.Array, step: jax.Array | int) -> jax.Array:
    """What a token is drawn from at temperature > 0, unnormalised: logits f32 [...,V] -> f32 [...,V]; `step` tokens of
    the response came before it."""
    return choose.weights(_allowed(settings, logits, step), settings.temperature, settings.top_k, settings.top_p)


def _allowed(settings: SamplingConfig, logits: jax.Array, step: jax.Array | int) -> jax.Array:
    """Logits with the stop ids masked before min_new_tokens."""
    if not (settings.stop_ids and settings.min_new_tokens):
        return logits
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    stops = _is_stop(settings, ids).reshape((1,) * (logits.ndim - 1) + (-1,))
    return choose.keep_only(logits, ~stops | (jnp.asarray(step) >= settings.min_new_tokens))


def _is_stop(settings: SamplingConfig, tokens: jax.Array) -> jax.Array:
    stops = jnp.asarray(settings.stop_ids, jnp.int32).reshape((1,) * tokens.ndim + (-1,))
    return jnp.any(tokens[..., None] == stops, axis=-1)


def _draw(settings: SamplingConfig, logits: jax.Array, state: Decoding) -> Decoding:
    """Draws the next token of every response from logits f32 [B,N,V] and writes it down where it isn't done."""
    logits = constrain(logits, "batch", None, "vocab")
    lengths = state.lengths[:, :, None]  # tokens before this one, of each that isn't done
    allowed = _allowed(settings, logits, lengths)
    slot = state.step % settings.max_new_tokens
    if settings.temperature == 0:
        tokens, logps = choose.greedy(allowed)
    else:
        chances = distribution(settings, logits, lengths)
        uniform = jax.lax.dynamic_index_in_dim(state.uniforms, slot, axis=2, keepdims=False)
        tokens, totals = choose.draw(chances, uniform)
        logps = choose.drawn_log_probs(allowed, settings.temperature, tokens, totals)
    alive = ~state.done
    stopped = constrain(alive & _is_stop(settings, tokens), "batch", None)  # else the compiler cuts them over tensor

    def written(ring: jax.Array, new: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(ring, slot, axis=2)  # of a row that is done, perhaps a token of its own
        return jax.lax.dynamic_update_slice(ring, jnp.where(alive[:, :, None], new[:, :, None], old), (0, 0, slot))

    count = constrain(state.lengths + alive, "batch", None)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        drawn=written(state.drawn, tokens),
        logps=written(state.logps, logps),
        lengths=count,
        done=state.done | stopped | (count >= settings.max_new_tokens),
        finished=state.finished | stopped,
        last=jnp.where(alive, tokens, 0),
    )


# The weights' layout for decoding -------------------------------------------------------------------------------------


def decode_weights(config: ModelConfig, weights: PyTree) -> PyTree:
    """The trunk in the compute dtype, cut over the tensor axis alone: what fsdp shards is gathered here, once, so that
    the loop gathers no weight. A scalar head is left out."""
    cast = decoder.cast_weights(config, {name: weights[name] for name in ("params", "lora") if name in weights})
    mesh = sharding.current_mesh()
    if mesh is None:
        return cast
    return sharding.map_weights(
        lambda name, x: jax.lax.with_sharding_constraint(x, decode_spec(name, x.shape, mesh)), cast
    )


def decode_layout(config: ModelConfig, weights: PyTree) -> PyTree:
    """`decode_weights` as a step reads them: a tree for each layer, and "output", the output matrix as [D,V]."""
    layout = decoder.decode_layout(config, weights)
    matrix = decoder.unembedding(config, weights).astype(config.operand_dtype).T
    # Without the barrier XLA folds the transpose into the product and walks the matrix against its grain every step.
    return layout | {"output": jax.lax.optimization_barrier(matrix)}


def decode_spec(name: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The PartitionSpec of one weight for decoding: as in training, without the fsdp axis."""
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.weight_spec(name, shape, mesh)))
