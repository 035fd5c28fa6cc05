"""Takes the pure distribution functions of `ops.choose`; gives proof that what is drawn is what was allowed, as often
as it should be, with the log-probability it had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.ops import choose

LAST_UNIFORM = 1 - 2**-24  # the largest float32 below 1


def _logits(shape, seed=0, spread=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32))


def _probabilities(weights):
    wide = np.asarray(weights, np.float64)
    return wide / wide.sum(axis=-1, keepdims=True)


def test_weights_by_hand():
    logits = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3], jnp.float32))
    np.testing.assert_allclose(_probabilities(choose.weights(logits, 1.0)), [0.1, 0.4, 0.2, 0.3], rtol=1e-6)
    # Temperature 0.5 squares the probabilities: 1, 16, 4, 9 of 30.
    np.testing.assert_allclose(_probabilities(choose.weights(logits, 0.5)), np.asarray([1, 16, 4, 9]) / 30, rtol=1e-6)
    np.testing.assert_allclose(_probabilities(choose.weights(logits, 1.0, top_k=2)), [0, 4 / 7, 0, 3 / 7], rtol=1e-6)
    # 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.2: three tokens stay.
    np.testing.assert_allclose(
        _probabilities(choose.weights(logits, 1.0, top_p=0.75)), [0, 4 / 9, 2 / 9, 3 / 9], rtol=1e-6
    )
    # top_p after top_k: 4/7 alone holds 0.5 of what top_k left, though only 0.4 of all.
    np.testing.assert_allclose(_probabilities(choose.weights(logits, 1.0, 2, 0.5)), [0, 1, 0, 0])
    # top_p after temperature: 16/30 alone holds 0.5, where at temperature 1 it took two tokens.
    np.testing.assert_allclose(_probabilities(choose.weights(logits, 0.5, top_p=0.5)), [0, 1, 0, 0])


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (7, None), (500, None), (None, 0.01), (None, 0.9), (40, 0.8)])
def test_truncation_equals_transformers(torch, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = _logits((16, 512))
    expected = TemperatureLogitsWarper(0.7)(None, torch.tensor(np.asarray(logits)))
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = torch.softmax(expected, -1).numpy()
    found = _probabilities(choose.weights(logits, 0.7, top_k, top_p))
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_top_k_above_the_number_of_allowed_tokens_keeps_them_all():
    logits = choose.keep_only(_logits((256,)), jnp.arange(256) < 5)
    kept = choose.weights(logits, 1.0, top_k=50)
    np.testing.assert_array_equal(np.asarray(kept) > 0, np.arange(256) < 5)


@pytest.mark.parametrize("allowed", ["first", "last", "scattered", "one block", "all"])
def test_a_forbidden_token_is_never_drawn_at_any_uniform(allowed):
    ids = np.arange(512)
    masks = {
        "first": ids == 0,
        "last": ids == 511,
        "scattered": np.random.default_rng(1).random(512) < 0.02,
        "one block": (ids >= 140) & (ids < 150),
        "all": ids >= 0,
    }
    mask = masks[allowed]
    w = choose.weights(choose.keep_only(_logits((512,)), jnp.asarray(mask)), 1.0)
    edges = np.cumsum(_probabilities(w))
    near = np.concatenate([edges, np.nextafter(edges.astype(np.float32), 0), edges + 1e-7, edges - 1e-7])
    sweep = np.concatenate([np.linspace(0, 1, 20_000), near, [0, 2**-24, LAST_UNIFORM]])
    uniforms = jnp.asarray(np.clip(sweep, 0, LAST_UNIFORM).astype(np.float32))
    draw = jax.jit(lambda u: choose.draw(jnp.broadcast_to(w, (len(sweep), 512)), u))
    tokens, totals = draw(uniforms)
    assert mask[np.asarray(tokens)].all()
    np.testing.assert_allclose(totals, np.sum(w), rtol=1e-6)


def test_a_million_draws_hold_no_forbidden_token_and_the_right_frequencies():
    vocab, rows = 640, 1000
    allowed = np.random.default_rng(2).random(vocab) < 0.5
    w = choose.weights(choose.keep_only(_logits((vocab,), spread=1.0), jnp.asarray(allowed)), 0.8, 200, 0.95)

    @jax.jit
    def count(key):
        tokens, _ = choose.draw(jnp.broadcast_to(w, (rows, vocab)), jax.random.uniform(key, (rows,)))
        return jnp.zeros(vocab, jnp.int32).at[tokens].add(1)

    counts = np.asarray(sum(count(jax.random.fold_in(jax.random.key(0), i)) for i in range(1000)))
    p = _probabilities(w)
    assert counts.sum() == 1_000_000 and counts[p == 0].sum() == 0
    real = p > 0
    chi_square = np.sum((counts[real] - 1e6 * p[real]) ** 2 / (1e6 * p[real]))
    degrees = real.sum() - 1
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def test_draw_inverts_the_cumulative_distribution():
    w = choose.weights(_logits((32, 1280), seed=3), 1.0, top_p=0.95)
    u = np.random.default_rng(4).random(32).astype(np.float32)
    tokens, _ = choose.draw(w, jnp.asarray(u))
    ends = np.cumsum(_probabilities(w), axis=-1)
    at = np.take_along_axis(ends, np.asarray(tokens)[:, None], axis=-1)[:, 0]
    before = at - np.take_along_axis(_probabilities(w), np.asarray(tokens)[:, None], axis=-1)[:, 0]
    assert (before - 1e-6 <= u).all() and (u <= at + 1e-6).all()


def test_draw_shapes_and_small_vocabulary():
    w = jnp.asarray([[[0, 1, 0, 1], [1, 0, 0, 0]]], jnp.float32)
    tokens, totals = choose.draw(w, jnp.asarray([[0.6, 0.99]], jnp.float32))
    np.testing.assert_array_equal(tokens, [[3, 0]])
    np.testing.assert_array_equal(totals, [[2, 1]])
    assert tokens.dtype == jnp.int32 and totals.dtype == jnp.float32


def test_log_probs_of_what_was_drawn_are_those_of_the_truncated_distribution():
    logits = _logits((64, 1280), seed=5)
    w = choose.weights(logits, 0.7, 40, 0.9)
    tokens, totals = choose.draw(w, jnp.asarray(np.random.default_rng(6).random(64).astype(np.float32)))
    found = choose.drawn_log_probs(logits, 0.7, tokens, totals)
    expected = np.take_along_axis(_probabilities(w), np.asarray(tokens)[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(found, np.log(expected), atol=1e-5)


def test_greedy_is_certain_of_the_first_maximum():
    tokens, logps = choose.greedy(jnp.asarray([[1, 3, 3], [5, 0, 0]], jnp.float32))
    np.testing.assert_array_equal(tokens, [1, 0])
    np.testing.assert_array_equal(logps, [0, 0])
