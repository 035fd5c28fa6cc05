"""Takes arrays and patterns; gives the sizes of letters, or an error that names the array."""

import jax
import jax.numpy as jnp
import pytest

from mpo_jax.ops import shapes

X = jnp.zeros((2, 3), jnp.float32)


def test_letters_bind_across_arrays():
    assert shapes.check("f32[B,N] i32[B] bool[]", x=X, y=jnp.zeros(2, jnp.int32), z=jnp.asarray(True)) == {
        "B": 2,
        "N": 3,
    }
    assert shapes.check("f32[B,3] f32[B]", x=X, y=None) == {"B": 2}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("f32[B] f32[B,N]", r"x is float32\[2, 3\]; expected \[B\]$"),
        ("f32[B,4] f32[B,N]", r"x is float32\[2, 3\]; expected \[B,4\]$"),
        ("f32[B,B] f32[B,N]", r"x is float32\[2, 3\]; expected \[B,B\]$"),
        ("f32[N,B] f32[B,N]", r"y is float32\[2, 3\]; expected \[B,N\] with B = 3, N = 2"),
        ("i32[B,N] f32[B,N]", "x is float32.*; expected dtype int32"),
        ("f32[B,N]", "describes 1 arrays, 2 given"),
        ("f32 f32[B,N]", "not like"),
    ],
)
def test_what_does_not_fit_is_named(pattern, message):
    with pytest.raises(ValueError, match=message):
        shapes.check(pattern, x=X, y=X)


def test_the_check_runs_while_tracing():
    def step(x):
        shapes.check("f32[B]", x=x)
        return x

    with pytest.raises(ValueError, match="x is float32"):
        jax.jit(step)(X)
