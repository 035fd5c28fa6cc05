"""Values enter programs that XLA may simplify; they must leave rounded, and gradients pass as those of a cast."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpo_jax.ops.rounding import in_float32, rounded

VALUES = np.random.default_rng(0).normal(size=1000).astype(np.float32)
NARROW = VALUES.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("excess", [True, False])
def test_a_cast_there_and_back_rounds_whatever_the_compiler_may_leave_out(excess):
    options = {"xla_allow_excess_precision": excess}
    there_and_back = jax.jit(lambda x: 3 * rounded(x, jnp.bfloat16).astype(jnp.float32), compiler_options=options)
    np.testing.assert_array_equal(there_and_back(VALUES), 3 * NARROW.astype(np.float32))


def test_the_gradient_is_that_of_a_cast():
    weights = jnp.asarray(NARROW)
    by = [jax.grad(lambda x, f=f: (f(x) * weights).astype(jnp.float32).sum())(jnp.asarray(VALUES)) for f in (
        lambda x: rounded(x, jnp.bfloat16), lambda x: x.astype(jnp.bfloat16))]  # fmt: skip
    np.testing.assert_array_equal(*by)
    assert by[0].dtype == jnp.float32


@pytest.mark.parametrize("excess", [True, False])
def test_elementwise_chains_round_after_each_function(excess):
    """x * y + x in bfloat16: two roundings, also where the compiler would keep the product in float32."""
    one, two = NARROW[:500], NARROW[500:]
    options = {"xla_allow_excess_precision": excess}

    def chain(x, y):
        return in_float32(jnp.add, in_float32(jnp.multiply, x, y), x)

    found = jax.jit(chain, compiler_options=options)(one, two)
    product = (one.astype(np.float32) * two.astype(np.float32)).astype(ml_dtypes.bfloat16)
    expected = (product.astype(np.float32) + one.astype(np.float32)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_float32_is_left_alone():
    assert rounded(jnp.asarray(VALUES), jnp.float32) is not None
    np.testing.assert_array_equal(rounded(jnp.asarray(VALUES), jnp.float32), VALUES)
    text = jax.jit(lambda x: in_float32(jnp.add, rounded(x, jnp.float32), x)).lower(VALUES).as_text()
    assert "reduce_precision" not in text and "convert" not in text and "bf16" not in text


def test_what_the_backward_pass_keeps_is_narrow():
    """Not the float32 copies of what an elementwise function reads: in a scan they would be stacked."""
    x = jnp.asarray(NARROW)
    _, pull = jax.vjp(lambda x: in_float32(jnp.multiply, x, in_float32(jax.nn.silu, x)), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(pull)} == {jnp.dtype(jnp.bfloat16)}
