"""Takes positions and frequencies; gives proof by hand, and that attention sees differences of positions alone."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax.ops import rope


def test_frequencies_by_hand():
    # theta^(-2i/dim): 10000^0, 10000^(-1/2); the context stretched fourfold.
    np.testing.assert_allclose(rope.frequencies(4, 10_000.0), [1.0, 0.01], rtol=1e-6)
    np.testing.assert_allclose(rope.frequencies(4, 10_000.0, linear_factor=4.0), [0.25, 0.0025], rtol=1e-6)


def test_llama3_frequencies_by_hand():
    # 100 original positions, low 1, high 4: waves up to 25 positions are kept, from 100 on slowed by 8.
    # A wave of 40: (100 / 40 - 1) / (4 - 1) = 0.5, half of each: factor (0.5 + 0.5 / 8) = 0.5625.
    waves = np.asarray([20.0, 25.0, 40.0, 100.0, 1000.0])
    plain = (2 * math.pi / waves).astype(np.float32)
    scaled = rope.llama3_frequencies(plain, 8.0, 1.0, 4.0, 100)
    np.testing.assert_allclose(scaled / plain, [1.0, 1.0, 0.5625, 0.125, 0.125], rtol=1e-5)


def test_rotation_by_hand():
    # Quarter turns: position 1 at pi/2 rotates (first, second) half to (-second, first); position 2 negates both.
    positions = jnp.asarray([[0, 1, 2]], jnp.int32)
    cos, sin = rope.angles(positions, np.asarray([math.pi / 2, math.pi], np.float32))
    assert cos.shape == (1, 3, 2)
    x = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 3.0, 4.0], jnp.float32), (1, 3, 1, 4))
    turned = rope.rotate(x, cos, sin)[0, :, 0]
    # Pairs are (1, 3) and (2, 4): the second pair turns by pi, then by 2 pi.
    np.testing.assert_allclose(turned, [[1, 2, 3, 4], [-3, -2, 1, -4], [-1, 2, -3, 4]], atol=1e-5)


def test_kept_angles_are_the_same_angles():
    positions = jnp.asarray([[0, 1, 2, 4095]], jnp.int32)
    plain, kept = (rope.angles(positions, rope.frequencies(8, 10_000.0), kept) for kept in (False, True))
    for one, other in zip(plain, kept, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_partial_rotation_keeps_the_rest():
    cos, sin = rope.angles(jnp.asarray([[1]], jnp.int32), np.asarray([math.pi / 2], np.float32))
    x = jnp.asarray([[[[1.0, 2.0, 7.0, 9.0]]]], jnp.float32)
    np.testing.assert_allclose(rope.rotate(x, cos, sin)[0, 0, 0], [-2, 1, 7, 9], atol=1e-6)


@pytest.mark.parametrize("shift", [1, 100, 1000])
def test_products_depend_on_differences_of_positions(shift):
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)).astype(np.float32)) for _ in range(2))
    frequencies = rope.frequencies(8, 10_000.0)

    def product(query_position, key_position):
        at = [rope.angles(jnp.asarray([[p]], jnp.int32), frequencies) for p in (query_position, key_position)]
        return float(jnp.sum(rope.rotate(query, *at[0]) * rope.rotate(key, *at[1])))

    assert product(7 + shift, 3 + shift) == pytest.approx(product(7, 3), abs=1e-3)
    assert product(0, 0) == pytest.approx(float(jnp.sum(query * key)), abs=1e-5)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    cos, sin = rope.angles(jnp.asarray([[500]], jnp.int32), rope.frequencies(8, 10_000.0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 2, 8)), jnp.bfloat16)
    out = rope.rotate(x, cos, sin)
    assert out.dtype == jnp.bfloat16
    exact = rope.rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(exact.astype(jnp.bfloat16)))
