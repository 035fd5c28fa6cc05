"""Takes tokens, lengths and scores; gives proof that repetition and correlation are what their definitions say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.ops import statistics

NAN, INF = float("nan"), float("inf")


def i32(values):
    return jnp.asarray(values, jnp.int32)


def f32(*values):
    return jnp.asarray(values, jnp.float32)


def test_repeated_ngrams_by_hand():
    tokens = i32([[[1, 2, 1, 2, 1, 2, 1], [5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7], [8, 8, 8, 8, 8, 8, 8]]])
    mask = jnp.arange(7)[None, None] < i32([[7, 6, 7, 3]])[:, :, None]
    # 1212 2121 1212 2121: 2 of 4 stood before. 5555 three times: 2 of 3. None of 4. Fewer than 4 tokens: 0.
    np.testing.assert_allclose(statistics.repeated_ngram_share(tokens, mask), [[0.5, 2 / 3, 0.0, 0.0]], rtol=1e-6)
    # Pairs: 12 21 12 21 12 21, 4 of 6; 55 five times, 4 of 5; none; 88 twice, 1 of 2.
    np.testing.assert_allclose(statistics.repeated_ngram_share(tokens, mask, n=2), [[4 / 6, 0.8, 0.0, 0.5]], rtol=1e-6)
    assert float(statistics.repeated_ngram_share(tokens, mask, n=8).sum()) == 0.0
    with pytest.raises(ValueError, match="n is 0"):
        statistics.repeated_ngram_share(tokens, mask, n=0)


_share = jax.jit(statistics.repeated_ngram_share, static_argnames="n")


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.integers(0, 12), st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_repeated_ngrams_equal_a_set_count(tokens, size, n):
    mask = jnp.arange(12)[None, None] < size
    grams = [tuple(tokens[k : k + n]) for k in range(size - n + 1)]
    wanted = 1 - len(set(grams)) / len(grams) if grams else 0.0
    assert float(_share(i32([[tokens]]), mask, n=n)[0, 0]) == pytest.approx(wanted, abs=1e-6)


def test_correlation_by_hand():
    x, y = f32(1.0, 2.0, 3.0, NAN), f32(1.0, 3.0, 2.0, INF)
    mask = jnp.asarray([True, True, True, False])
    # Deviations (-1, 0, 1) and (-1, 1, 0): products 1, squares 2 and 2.
    assert float(statistics.correlation(x, y, mask)) == pytest.approx(0.5)
    assert float(statistics.correlation(x, -2 * x, mask)) == pytest.approx(-1.0)
    assert float(statistics.correlation(x, jnp.full(4, 0.1, jnp.float32), mask)) == 0.0
    assert float(statistics.correlation(x, y, mask & False)) == 0.0


def test_correlation_of_lengths_and_scores_equals_numpy():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 512, (16, 4))
    scores = (0.004 * lengths + rng.normal(0, 1, lengths.shape) + 1000).astype(np.float32)
    mask = rng.random(lengths.shape) < 0.7
    found = statistics.correlation(jnp.asarray(lengths, jnp.float32), jnp.asarray(scores), jnp.asarray(mask))
    assert float(found) == pytest.approx(np.corrcoef(lengths[mask], scores[mask])[0, 1], abs=1e-4)


def test_moments_of_equal_values_do_not_spread():
    for value in (0.1, 1000.1, -3e7):
        mean, variance = statistics.moments(jnp.full((7, 9), value, jnp.float32), jnp.ones((7, 9), bool))
        assert float(mean) == np.float32(value) and float(variance) == 0.0
