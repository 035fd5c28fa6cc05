"""Random small models of every family enter; cached, packed, padded and sharded computations of one row must agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import sharding
from mpo_jax.models import attention, decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import masks

FAMILIES = ("llama", "llama3", "mistral", "qwen2_window", "qwen3", "gemma2", "gpt_neox", "gpt2")
PROMPTS = (6, 3, 1, 6)
P, R = 6, 5


def forward(config):
    return jax.jit(lambda weights, *batch: decoder.forward(config, weights, *batch))


def replies(responses: int, seed=0):
    """Ragged rows: for each, its prompt's tokens and its responses' tokens."""
    random = np.random.default_rng(seed)
    draw = lambda size: random.integers(3, 96, size).astype(np.int32)  # noqa: E731
    return [(draw(prompt), [draw(random.integers(1, R + 1)) for _ in range(responses)]) for prompt in PROMPTS]


def laid_out(pairs, length: int, slots: bool):
    """tokens, positions, segments i32 [B,T]: tight, or in slots (prompt right-aligned in P, then R for each response);
    and the columns of each row's responses."""
    tokens, positions, segments = np.zeros((3, len(pairs), length), np.int32)
    columns = []
    for row, (prompt, responses) in enumerate(pairs):
        start = P - len(prompt) if slots else 0
        pieces = [(start, prompt, 0, 1)]
        end = start + len(prompt)
        for n, response in enumerate(responses):
            begin = P + n * R if slots else end
            pieces.append((begin, response, len(prompt), 2 + n))
            end = begin + len(response)
        for begin, piece, position, segment in pieces:
            cut = slice(begin, begin + len(piece))
            tokens[row, cut], segments[row, cut] = piece, segment
            positions[row, cut] = position + np.arange(len(piece))
        columns.append([slice(begin, begin + len(piece)) for begin, piece, _, _ in pieces[1:]])
    return (tokens, positions, segments), columns


def hidden_of(run, weights, pairs, length, slots):
    """The hidden states of every response's tokens, row by row."""
    batch, columns = laid_out(pairs, length, slots)
    hidden = np.asarray(run(weights, *map(jnp.asarray, batch)))
    return [hidden[row, cut] for row, cuts in enumerate(columns) for cut in cuts]


@pytest.mark.parametrize("name", FAMILIES)
def test_tight_rows_slot_rows_and_separate_sequences_agree(random_model, name):
    config, weights = random_model(name)
    run, length = forward(config), P + 4 * R
    for responses in (1, 2, 4):
        pairs = replies(responses)
        tight = hidden_of(run, weights, pairs, length, slots=False)
        slots = hidden_of(run, weights, pairs, length, slots=True)
        alone = []
        for n in range(responses):  # one call for all rows' n-th response, each a sequence of its own
            alone.append(hidden_of(run, weights, [(prompt, [own[n]]) for prompt, own in pairs], length, slots=False))
        for row in range(len(pairs)):
            for n in range(responses):
                np.testing.assert_allclose(tight[row * responses + n], alone[n][row], atol=2e-5)
                np.testing.assert_allclose(slots[row * responses + n], alone[n][row], atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_decode_equals_full_forward(random_model, name):
    config, weights = random_model(name)
    responses = 2
    random = np.random.default_rng(1)
    pairs = [(prompt, [random.integers(3, 96, R).astype(np.int32) for _ in range(responses)])
             for prompt, _ in replies(1)]  # fmt: skip
    (tokens, positions, segments), _ = laid_out(pairs, P + responses * R, slots=True)
    full = np.asarray(forward(config)(weights, *map(jnp.asarray, (tokens, positions, segments))))

    prefill = jax.jit(lambda weights, *batch: decoder.prefill(config, weights, *batch, responses, R))
    hidden, cache = prefill(weights, *(jnp.asarray(x[:, :P]) for x in (tokens, positions, segments)))
    real = segments[:, :P] > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], full[:, :P][real], atol=2e-5)

    layout = decoder.decode_layout(config, weights)
    step = jax.jit(lambda layout, *given: decoder.decode_step(config, layout, *given))
    by_response = lambda x, slot: jnp.asarray(x[:, P:].reshape(len(pairs), responses, R)[:, :, slot])  # noqa: E731
    for slot in range(R):
        hidden, cache = step(layout, by_response(tokens, slot), by_response(positions, slot), cache)
        expected = full[:, P:].reshape(len(pairs), responses, R, -1)[:, :, slot]
        np.testing.assert_allclose(np.asarray(hidden), expected, atol=2e-5)
    assert int(cache.cursor) == R


def test_layers_of_one_kind_are_traced_once_in_a_step(monkeypatch):
    """Two kinds of layer, six layers. Of 32, each traced by itself in every loop of the sampler, a start takes long."""
    config = ModelConfig("llama", 104, 6, 24, 4, 2, 6, 40, 64, windows=(8, attention.NO_WINDOW) * 3)
    traced, real = [], attention.attend_step
    monkeypatch.setattr(attention, "attend_step", lambda *args: traced.append(args[4]) or real(*args))

    def step():
        weights = decoder.init(config, jax.random.key(0))
        columns = jnp.ones((2, 5), jnp.int32)
        _, cache = decoder.prefill(config, weights, columns, columns, columns, 1, 4)
        one = jnp.ones((2, 1), jnp.int32)
        return decoder.decode_step(config, decoder.decode_layout(config, weights), one, one, cache)

    jax.eval_shape(step)
    assert sorted(traced) == [0, 1]


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "gemma2", "gpt_neox", "gpt2"])
def test_gradients_reach_exactly_what_a_token_may_see(random_model, name):
    """Every column holds a token id of its own, so that the gradient of its embedding row is that of its input; the
    columns with a gradient are those the visibility rule reaches in as many steps as there are layers."""
    config, weights = random_model(name)
    lengths = (6, 4, 3)  # prompt, response 0, response 1; then two columns of padding
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None].astype(np.int32)
    positions = np.concatenate([np.arange(6), 6 + np.arange(4), 6 + np.arange(3), [0, 0]])[None].astype(np.int32)
    columns = positions.shape[1]
    tokens = np.arange(10, 10 + columns, dtype=np.int32)[None]

    def output(table, column):
        params = weights["params"] | {"embed": {"embedding": table}}
        hidden = decoder.forward(config, {"params": params}, tokens, jnp.asarray(positions), jnp.asarray(segments))
        direction = jax.random.normal(jax.random.key(0), (config.width,), jnp.float32)
        return jnp.sum(hidden[0, column] * direction)

    gradients = jax.jit(jax.vmap(jax.grad(output), in_axes=(None, 0)))(
        weights["params"]["embed"]["embedding"], jnp.arange(columns)
    )
    reached = np.abs(np.asarray(gradients)[:, 10 : 10 + columns]).max(axis=-1) > 0
    expected = np.eye(columns, dtype=bool)
    for window in config.windows or (None,) * config.layers:
        sees = np.asarray(masks.visible(jnp.asarray(positions), jnp.asarray(segments), window))[0]
        expected = (sees.astype(int) @ expected.astype(int)) > 0
    np.testing.assert_array_equal(reached, expected)
    assert not np.triu(reached, 1).any()
    assert not reached[10:13, 6:10].any()  # the second response sees nothing of the first


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("qwen3", ((1, 2, 4), (2, 4, 1), (4, 1, 2), (8, 1, 1))),
        ("gemma2", ((2, 2, 2),)),
        ("gpt_neox", ((1, 4, 2),)),
        ("gpt2", ((1, 2, 4),)),
    ],
)
def test_same_result_on_every_mesh(random_model, name, meshes):
    config, weights = random_model(name, padded_vocab=512)
    (tokens, positions, segments), _ = laid_out(replies(2) + replies(2, seed=7), P + 2 * R, slots=False)
    batch = tuple(map(jnp.asarray, (tokens, positions, segments)))

    def run(weights, *batch):
        hidden = decoder.forward(config, weights, *batch)
        return decoder.logits(config, weights, hidden)[..., : config.vocab_size], decoder.scalar_head(weights, hidden)

    expected = jax.jit(run)(weights, *batch)
    for sizes in meshes:
        mesh = sharding.make_mesh(*sizes)
        placed = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
        with jax.set_mesh(mesh):
            found = jax.jit(run)(placed, *jax.device_put(batch, sharding.batch_sharding(mesh)))
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=5e-5, err_msg=str(sizes))


def test_remat_and_bfloat16_change_nothing_but_rounding(random_model):
    config, weights = random_model("qwen3")
    (tokens, positions, segments), _ = laid_out(replies(2), P + 2 * R, slots=False)

    def hidden(dtype, weights, remat="none"):
        changed = dataclasses.replace(config, dtype=dtype, remat=remat)
        return decoder.forward(changed, weights, tokens, positions, segments)

    def value_and_gradient(remat="none"):
        return jax.jit(jax.value_and_grad(lambda weights: jnp.sum(hidden("float32", weights, remat) ** 2)))(weights)

    value, gradient = value_and_gradient()
    for remat in ("full", "dots"):
        again, same = value_and_gradient(remat=remat)
        np.testing.assert_allclose(value, again, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), gradient, same)
    rough = jax.jit(lambda weights: jnp.sum(hidden("bfloat16", weights).astype(jnp.float32) ** 2))(weights)
    np.testing.assert_allclose(value, rough, rtol=2e-2)


def test_padding_rows_begin_at_zero_and_real_rows_are_the_same_on_any_mesh(random_model):
    config, _ = random_model("llama")

    def tables(config):
        params = decoder.init(config, jax.random.key(5))["params"]
        return params["embed"]["embedding"], params["lm_head"]["kernel"]

    wider = dataclasses.replace(config, padded_vocab=384)
    for one, other in zip(
        *(map(np.asarray, jax.jit(tables, static_argnums=0)(c)) for c in (config, wider)), strict=True
    ):
        assert one.shape == (128, 64) and other.shape == (384, 64)
        assert not one[96:].any() and not other[96:].any()
        np.testing.assert_array_equal(one[:96], other[:96])
        assert abs(one[:96].std() - 0.02) < 0.001


def test_what_the_backward_pass_computes_again_it_does_not_keep(random_model):
    """In bfloat16, norms and activations: the residuals of a step are fewer bytes than where their steps are kept."""
    from jax._src.ad_checkpoint import saved_residuals

    rows, _ = laid_out(replies(2), P + 2 * R, slots=False)

    def kept(recomputes: bool) -> int:
        config, weights = random_model("llama", dtype="bfloat16", unroll=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(config), "recomputes", recomputes)
            found = saved_residuals(lambda w: decoder.forward(config, w, *map(jnp.asarray, rows)), weights)
        return sum(aval.size * aval.dtype.itemsize for aval, origin in found if "argument" not in origin)

    assert kept(True) < 0.75 * kept(False)
