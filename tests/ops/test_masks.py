"""Takes segments and positions drawn on paper; gives proof of visibility, response columns and masked sums."""

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.ops import masks

NAN, INF = float("nan"), float("inf")

# [prompt prompt | response 0: two tokens | response 1: two tokens | padding]: both continue from position 2.
SEGMENTS = jnp.asarray([[1, 1, 2, 2, 3, 3, 0]], jnp.int32)
POSITIONS = jnp.asarray([[0, 1, 2, 3, 2, 3, 0]], jnp.int32)


def test_visible_by_hand():
    wanted = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],  # response 1 sees the prompt, not response 0
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],  # padding sees itself, so that its softmax has something
    ]
    np.testing.assert_array_equal(masks.visible(POSITIONS, SEGMENTS)[0], np.asarray(wanted, bool))


def test_a_sliding_window_counts_positions_not_columns():
    wanted = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0],  # position 2 sees position 1, three columns away
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(masks.visible(POSITIONS, SEGMENTS, window=2)[0], np.asarray(wanted, bool))


def test_left_padding_is_seen_by_none_of_the_row():
    seen = masks.visible(jnp.asarray([[0, 0, 1]], jnp.int32), jnp.asarray([[0, 1, 2]], jnp.int32))
    np.testing.assert_array_equal(seen[0], np.asarray([[1, 0, 0], [0, 1, 0], [0, 1, 1]], bool))


def test_response_columns_by_hand():
    segments = jnp.asarray([[1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 2, 3], [1, 1, 1, 0, 0, 0, 0]], jnp.int32)
    target, source, segment = masks.response_columns(segments, window=4)
    # Row 0: columns 2 to 5, each response's first token predicted from the prompt's end, column 1.
    np.testing.assert_array_equal(target[0], [2, 3, 4, 5])
    np.testing.assert_array_equal(source[0], [1, 2, 1, 4])
    np.testing.assert_array_equal(segment[0], [2, 2, 3, 3])
    # Row 1: columns 5 and 6, two one-token responses; the window's rest lies beyond the row and holds nothing.
    np.testing.assert_array_equal(target[1], [5, 6, 6, 6])
    np.testing.assert_array_equal(source[1, :2], [4, 4])
    np.testing.assert_array_equal(segment[1], [2, 3, 0, 0])
    # Row 2: no response at all.
    np.testing.assert_array_equal(segment[2], [0, 0, 0, 0])


def test_response_columns_across_slots_that_hold_nothing():
    # Slot form: the prompt left-padded, two slots of three, the first response one token long.
    segments = jnp.asarray([[0, 1, 1, 2, 0, 0, 3, 3, 0]], jnp.int32)
    target, source, segment = masks.response_columns(segments, window=6)
    np.testing.assert_array_equal(target[0], [3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(segment[0], [2, 0, 0, 3, 3, 0])
    np.testing.assert_array_equal(np.asarray(source)[0, [0, 3, 4]], [2, 2, 6])


def test_last_index_by_hand():
    segments = jnp.asarray([[1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0]], jnp.int32)
    # An empty response is read at the prompt's end; a row of padding at column 0.
    np.testing.assert_array_equal(masks.last_index(segments, 2), [[3, 5], [4, 2], [0, 0]])


def test_by_response_by_hand():
    values = jnp.asarray([[1.0, 2.0, 4.0, NAN], [8.0, INF, 16.0, NAN]], jnp.float32)
    segment = jnp.asarray([[2, 2, 3, 0], [3, 0, 3, 0]], jnp.int32)
    np.testing.assert_array_equal(masks.by_response(values, segment, 2), [[3.0, 4.0], [0.0, 24.0]])
    grad = jax.grad(lambda v: masks.by_response(v, segment, 2)[0, 0])(values)
    np.testing.assert_array_equal(grad, [[1, 1, 0, 0], [0, 0, 0, 0]])


def test_masked_sum_and_mean_by_hand():
    values, mask = jnp.asarray([1.0, NAN, 3.0, INF], jnp.float32), jnp.asarray([True, False, True, False])
    assert float(masks.masked_sum(values, mask)) == 4.0
    assert float(masks.masked_mean(values, mask)) == 2.0  # by the mask's sum, not by its size
    nothing = jnp.zeros(4, bool)
    assert float(masks.masked_mean(values, nothing)) == 0.0
    np.testing.assert_array_equal(jax.grad(lambda v: masks.masked_mean(v, mask))(values), [0.5, 0, 0.5, 0])
    np.testing.assert_array_equal(jax.grad(lambda v: masks.masked_mean(v, nothing))(values), 0)
