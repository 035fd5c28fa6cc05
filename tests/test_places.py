"""Rows by group and place enter; what is taken and put must be what NumPy takes and puts, and stay on its device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpo_jax import places, sharding

WHICH = jnp.asarray([[2, 0], [1, 3]], jnp.int32)


def test_rows_are_taken_within_their_group():
    x = jnp.arange(16).reshape(8, 2)
    taken = places.take({"x": x, "scalar": jnp.int32(3)}, WHICH)
    np.testing.assert_array_equal(taken["x"], np.arange(16).reshape(8, 2)[[2, 0, 5, 7]])
    assert taken["scalar"] == 3


def test_rows_are_put_within_their_group_and_left_out_beyond_its_end():
    new = -jnp.ones((4, 1), jnp.int32) * jnp.arange(1, 5)[:, None]
    put = places.put(jnp.arange(8)[:, None], jnp.asarray([[2, 4], [0, 3]]), new)
    np.testing.assert_array_equal(put[:, 0], [0, 1, -1, 3, -3, 5, 6, -4])


def test_those_that_are_meant_come_first_in_their_own_order():
    meant = jnp.asarray([False, True, False, True, True, False, True, True])
    np.testing.assert_array_equal(places.first(meant, 2), [[1, 3, 0, 2], [0, 2, 3, 1]])
    np.testing.assert_array_equal(places.per_group(meant, 2), [2, 3])


@pytest.mark.parametrize(("sizes", "rows", "expected"), [((8, 1, 1), 16, 8), ((2, 2, 2), 16, 4), ((8, 1, 1), 4, 1)])
def test_a_group_is_what_lies_on_a_device(sizes, rows, expected):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        assert places.groups(rows, 2 * rows) == expected
    assert places.groups(rows) == 1


def test_no_row_leaves_its_device():
    mesh = sharding.make_mesh(4, 2, 1)
    x = jax.ShapeDtypeStruct((16, 3, 5), jnp.float32, sharding=sharding.batch_sharding(mesh))
    which = jax.ShapeDtypeStruct((8, 1), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def moved(x, which):
        return places.put(x, which, places.take(x, which[:, ::-1] + 1))

    with jax.set_mesh(mesh):
        text = jax.jit(moved).lower(x, which).compile().as_text()
    assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if kind in text]
