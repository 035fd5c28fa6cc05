"""Random models and ragged rows enter; chunked log-probs, values and scores are held against the plain computation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import lm_head, scoring, sharding
from mpo_jax.models import decoder
from mpo_jax.models.config import ModelConfig
from mpo_jax.ops import masks
from mpo_jax.types import Batch

CONFIG = ModelConfig("llama", 1000, 2, 32, 4, 2, 8, 64, 128)
VARIANTS = {
    "plain": CONFIG,
    "tied_softcap": ModelConfig("gemma2", 1000, 2, 32, 4, 2, 8, 64, 128, tied_embeddings=True, final_softcap=5.0),
}


def ragged(rows=8, length=24, responses=2, vocab=1000, seed=0) -> Batch:
    """Rows of random lengths; the last row is a filler."""
    random = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows - 1):
        prompt = int(random.integers(2, 7))
        segments[row, :prompt], positions[row, :prompt] = 1, range(prompt)
        end = prompt
        for n in range(responses):
            size = int(random.integers(1, (length - 7) // responses + 1))
            segments[row, end : end + size] = 2 + n
            positions[row, end : end + size] = np.arange(prompt, prompt + size)
            end += size
    tokens = random.integers(0, vocab, (rows, length)).astype(np.int32)
    weight = (segments > 0).any(axis=1).astype(np.float32)
    ids = np.arange(rows, dtype=np.int32)
    return Batch(*map(jnp.asarray, (tokens, positions, segments, ids, ids, weight)), window=length - 2)


def naive(config, weights, batch, temperature):
    """[B,T,V] log-probs, the plain way: logps and entropy [B,T] of every token after what precedes it."""
    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments)
    table = jax.nn.log_softmax(decoder.logits(config, weights, hidden) / temperature, axis=-1)
    before, found = np.zeros(batch.tokens.shape, np.int32), np.asarray(batch.segments) > 1
    for row, segments in enumerate(np.asarray(batch.segments)):
        prompt_end = int((segments == 1).sum()) - 1
        for column in np.flatnonzero(segments > 1):
            before[row, column] = column - 1 if segments[column - 1] == segments[column] else prompt_end
    rows = np.arange(len(before))[:, None]
    logps = table[rows, before, batch.tokens]
    entropy = -jnp.sum(jnp.exp(table) * table, axis=-1)[rows, before]
    return jnp.where(found, logps, 0.0), jnp.where(found, entropy, 0.0)


def total(logps, entropy):
    return jnp.sum(jnp.sin(logps)) + 0.1 * jnp.sum(entropy)


def chunked_total(config, weights, batch, temperature, chunk=16):
    out = scoring.response_logps(config, weights, batch, temperature, entropy=True, chunk=chunk)
    return total(out.logps, out.entropy)


def fused_total(config, weights, batch, temperature, chunk=16):
    """The same, as the loss of a chunk's rows at a time."""

    def of_rows(out, rows):
        return total(out.logps, out.entropy), jnp.sum(rows.weight), {"rows": (jnp.sum(rows.weight), jnp.float32(1))}

    hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments)
    found, weight, metrics = scoring.loss_of_hidden(
        config, weights, hidden, batch, of_rows, batch, temperature, entropy=True, chunk=chunk
    )
    return found + jax.lax.stop_gradient(0 * (weight + metrics["rows"][0] / metrics["rows"][1]))


@functools.cache
def made(config):
    return jax.jit(lambda: decoder.init(config, jax.random.key(0), head=True))()


def jitted(function, *arguments):
    return jax.jit(function)(*arguments)


def every_scalar(weights, batch) -> np.ndarray:
    """The scalar head at every column, [B,T]."""

    def scalars(weights):
        hidden = decoder.forward(CONFIG, weights, batch.tokens, batch.positions, batch.segments)
        return decoder.scalar_head(weights, hidden)

    return np.asarray(jitted(scalars, weights))


def distance(left, right) -> float:
    return max(
        jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), left, right))
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", VARIANTS)
def test_response_logps_equal_naive(name, temperature):
    config, batch = VARIANTS[name], ragged()
    weights = made(config)
    value, grads = jitted(jax.value_and_grad(lambda w: chunked_total(config, w, batch, temperature)), weights)
    expected, expected_grads = jitted(
        jax.value_and_grad(lambda w: total(*naive(config, w, batch, temperature))), weights
    )
    np.testing.assert_allclose(value, expected, rtol=5e-6)
    assert distance(grads, expected_grads) < 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0.01


@pytest.mark.parametrize("longest", [lm_head.LONGEST, 5])
@pytest.mark.parametrize("chunk", [1, 48, 4096])
def test_a_loss_of_rows_and_its_gradient_are_those_of_the_log_probs(chunk, longest, monkeypatch):
    """Chunks of one row, of two (nine rows are not divided by two), and of all."""
    monkeypatch.setattr(lm_head, "LONGEST", longest)
    config, batch = VARIANTS["tied_softcap"], ragged(rows=9)
    weights, wanted = made(config), jnp.arange(9 * 22, dtype=jnp.float32).reshape(9, 22) / 99

    def of_rows(out, rows):
        batch, wanted = rows
        sums = out.seq_logps(2)
        margins = jax.nn.sigmoid(sums[:, 0] - sums[:, 1] + jnp.sum(jnp.where(out.mask, wanted * out.entropy, 0), 1))
        loss = jnp.sum(batch.weight * margins)
        return loss, jnp.sum(batch.weight), {"margin": (loss, jnp.sum(batch.weight))}

    def once(weights):
        hidden = decoder.forward(config, weights, batch.tokens, batch.positions, batch.segments)
        rows = batch, wanted
        return scoring.loss_of_hidden(config, weights, hidden, batch, of_rows, rows, 0.7, entropy=True, chunk=chunk)

    def twice(weights):
        return of_rows(scoring.response_logps(config, weights, batch, 0.7, entropy=True), (batch, wanted))

    found, expected = (
        jitted(jax.value_and_grad(lambda w, of=of: (3 * of(w)[0], of(w)[1:]), has_aux=True), weights)
        for of in (once, twice)
    )
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(found[0][1]), jax.tree.leaves(expected[0][1]), rtol=1e-5)
    assert distance(found[1], expected[1]) < 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(found[1])) > 0.01
    np.testing.assert_allclose(jitted(once, weights)[0], 3**-1 * found[0][0], rtol=1e-5)


def test_chunk_size_changes_nothing():
    batch, weights = ragged(), made(CONFIG)
    one, other = (
        jitted(lambda w, chunk=chunk: scoring.response_logps(CONFIG, w, batch, chunk=chunk).logps, weights)
        for chunk in (4096, 7)
    )
    np.testing.assert_allclose(other, one, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)])
def test_equal_on_every_mesh(shape):
    mesh = sharding.make_mesh(*shape)
    config, batch = VARIANTS["plain"], ragged()
    if shape[2] == 8:
        config = ModelConfig("llama", 1000, 2, 32, 8, 2, 4, 64, 128)  # fewer key-value heads than shards
    plain = made(config)
    expected, expected_grads = jitted(jax.value_and_grad(lambda w: chunked_total(config, w, batch, 0.7)), plain)
    padded = config.for_mesh(mesh)

    def pad(name, leaf):
        rows = padded.padded_vocab - config.padded_vocab if "embed/" in name or "lm_head" in name else 0
        return jnp.pad(leaf, ((0, rows),) + ((0, 0),) * (leaf.ndim - 1))

    weights = sharding.map_weights(pad, plain)
    weights = jax.device_put(weights, sharding.tree_shardings(weights, mesh))
    on_mesh = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        for of in (chunked_total, fused_total):
            value, grads = jax.jit(jax.value_and_grad(lambda w, b, of=of: of(padded, w, b, 0.7)))(weights, on_mesh)
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            assert distance(grads, sharding.map_weights(pad, expected_grads)) < 2e-5
        scores = jax.jit(lambda w, b: scoring.response_scores(padded, w, b, 2))(weights, on_mesh)
        values = jax.jit(lambda w, b: scoring.response_values(padded, w, b))(weights, on_mesh)
    np.testing.assert_allclose(scores, jitted(lambda w: scoring.response_scores(config, w, batch, 2), plain), atol=1e-5)
    np.testing.assert_allclose(values, jitted(lambda w: scoring.response_values(config, w, batch), plain), atol=1e-5)


def test_one_row_is_scored_on_a_mesh_that_does_not_divide_it():
    mesh = sharding.make_mesh(4, 2, 1)
    batch, weights = ragged(rows=3), made(CONFIG)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda w, b: scoring.response_logps(CONFIG, w, b).logps)(weights, batch)
    expected = jitted(lambda w: scoring.response_logps(CONFIG, w, batch).logps, weights)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_score_is_that_of_the_last_real_token_whatever_the_padding():
    """reward-bench #137: a score may not vary with the batch or with padding."""
    batch, weights = ragged(), made(CONFIG)
    score = jax.jit(lambda batch: scoring.response_scores(CONFIG, weights, batch, 2))
    scores, every = score(batch), every_scalar(weights, batch)
    for row in range(7):
        for n in range(2):
            last = np.flatnonzero(np.asarray(batch.segments[row]) == 2 + n)[-1]
            np.testing.assert_allclose(scores[row, n], every[row, last], atol=1e-6)
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 8))) if x.ndim == 2 else x, batch)
    np.testing.assert_allclose(score(wider), scores, atol=1e-6)
    alone = jax.tree.map(lambda x: x[2:3], batch)
    np.testing.assert_allclose(score(alone)[0], scores[2], atol=1e-6)


def test_values_stand_before_their_token():
    batch, weights = ragged(), made(CONFIG)
    values = jitted(lambda w: scoring.response_values(CONFIG, w, batch), weights)
    _, source_index, segment = masks.response_columns(batch.segments, batch.window)
    every = every_scalar(weights, batch)
    expected = np.where(segment > 0, np.take_along_axis(every, np.asarray(source_index), axis=1), 0)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert (np.asarray(values)[-1] == 0).all()


def compiled_step(config, batch, weights, chunk=lm_head.CHUNK, fused=False):
    def loss(weights, batch):
        if fused:
            return scoring.response_loss(config, weights, batch, sum_of_rows, chunk=chunk)[0]
        return jnp.sum(scoring.response_logps(config, weights, batch, chunk=chunk).logps)

    def sum_of_rows(out, rows):
        return jnp.sum(out.logps), jnp.sum(rows.weight), {}

    return jax.jit(jax.grad(loss)).lower(weights, batch).compile()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_no_buffer_of_all_logits(vocab, fused):
    """trl PR 2799: [B,T,V] logits dominate memory. The compiled gradient's temporaries stay far below them."""
    config = ModelConfig("llama", vocab, 1, 64, 4, 4, 16, 128, 512, tied_embeddings=True)
    weights = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    rows, length = 32, 256
    whole = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    batch = Batch(whole, whole, whole, ids, ids, jax.ShapeDtypeStruct((rows,), jnp.float32), window=length)
    compiled = compiled_step(config, batch, weights, fused=fused)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    all_logits = rows * length * config.padded_vocab * 4
    logits_of_a_chunk, matrix = lm_head.CHUNK * config.padded_vocab * 4, config.padded_vocab * config.width * 4
    print(f"V = {vocab}: temporaries {temporary / 2**20:.0f} MiB, [B,T,V] would be {all_logits / 2**20:.0f} MiB")
    assert temporary < 3 * logits_of_a_chunk + 4 * matrix + 2**27  # 2**27: activations and attention
    assert temporary < all_logits / 3
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    assert max(int(np.prod([int(size) for size in dims.split(",")])) for dims in shapes) < all_logits / 4 / 8


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def loop_collectives(text: str) -> list[int]:
    """The sizes, in elements, of all collectives in the bodies of an HLO module's while loops."""
    computations = {}
    for block in re.split(r"\n(?=(?:%|ENTRY))", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", block)
        if name:
            computations[name.group(1)] = block
    waiting = re.findall(r"body=%?([\w.\-]+)", text)
    seen, sizes = set(), []
    while waiting:
        name = waiting.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        waiting += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations[name])
        for shapes, _ in COLLECTIVE.findall(computations[name]):
            sizes += [
                int(np.prod([int(size) for size in dims.split(",") if size]))
                for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
            ]
    return sizes


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 4, 2)])
def test_chunk_loop_holds_no_collective_of_the_output_matrix(shape, fused):
    """With FSDP the output matrix is gathered once before the loop, its gradient reduced once after it."""
    mesh = sharding.make_mesh(*shape)
    config = ModelConfig("llama", 4096, 1, 64, 4, 4, 16, 128, 512).for_mesh(mesh)
    abstract = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    weights = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        sharding.tree_shardings(abstract, mesh),
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)), ragged(16, 64)
    )
    with jax.set_mesh(mesh):
        text = compiled_step(config, batch, weights, 16, fused).as_text()
    sizes = loop_collectives(text)
    assert sizes or shape[2] == 1, "the loop was not found"
    assert "while(" in text
    assert max(sizes, default=0) < config.padded_vocab * config.width / 8
    assert COLLECTIVE.search(text), "FSDP without any collective"
