"""Row lengths enter, real and drawn; that a plan is a partition, fixed in shape, and well filled is checked."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.plan import FILLER, batch_plan, choose_edges, ordered_plan, padding_efficiency, sample_rows
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError

ROWS = st.lists(st.integers(1, 100), min_size=1, max_size=80)


def fits(plan, lengths, windows) -> None:
    """Each row of each batch fits its bucket, in length and in window."""
    for bucket, rows in zip(plan.bucket, plan.rows, strict=True):
        rows, shape = rows[rows != FILLER], plan.buckets[bucket]
        assert len(rows) and (lengths[rows] <= shape.length).all() and (windows[rows] <= shape.window).all()
        assert shape.length % 8 == 0 and shape.window <= shape.length


@given(
    lengths=ROWS,
    batch_size=st.integers(1, 9),
    max_buckets=st.integers(1, 8),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_property_a_training_batch_is_full_of_real_rows(lengths, batch_size, max_buckets, epoch, seed):
    lengths = np.array(lengths)
    windows = lengths // 2
    plan = batch_plan(lengths, windows, batch_size, seed=seed, epoch=epoch, max_buckets=max_buckets)
    assert (plan.rows >= 0).all() and plan.rows.shape == (-(-len(lengths) // batch_size), batch_size)
    seen = np.bincount(plan.rows.ravel(), minlength=len(lengths))
    assert (seen >= 1).all(), "every row is in every epoch"
    if len(lengths) >= batch_size:
        assert (seen <= 2).all(), "what completes the epoch is seen twice, nothing more often"
        assert all(len(set(rows)) == batch_size for rows in plan.rows), "and no batch holds a row twice"
    else:
        assert seen.max() - seen.min() <= 1, "rows of less than one batch are repeated evenly"
    assert len(plan.buckets) <= max_buckets and sum(bucket.rows for bucket in plan.buckets) == len(lengths)
    fits(plan, lengths, windows)


@given(lengths=ROWS, batch_size=st.integers(1, 9), max_buckets=st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_property_scoring_meets_every_row_once_and_fills_one_batch_at_most(lengths, batch_size, max_buckets):
    lengths = np.array(lengths)
    windows = lengths // 2
    plan = batch_plan(lengths, windows, batch_size, seed=1, epoch=0, max_buckets=max_buckets, shuffle=False)
    used = plan.rows[plan.rows != FILLER]
    assert sorted(used.tolist()) == list(range(len(lengths)))
    filled = np.flatnonzero((plan.rows == FILLER).any(axis=1)).tolist()
    assert filled in ([], [len(plan) - 1]) and (plan.rows[-1] == FILLER).sum() == -len(lengths) % batch_size
    fits(plan, lengths, windows)


@given(lengths=ROWS, batch_size=st.integers(1, 9), max_buckets=st.integers(1, 8), sample=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_property_a_sample_is_of_whole_batches_and_lies_in_every_larger_one(lengths, batch_size, max_buckets, sample):
    lengths = np.array(lengths)
    windows = lengths // 2

    def drawn(size, **settings):
        found = batch_plan(
            lengths, windows, batch_size, max_buckets=max_buckets, sample=size, shuffle=False, **settings
        )
        fits(found, lengths, windows)
        return found

    plan = drawn(sample, seed=0, epoch=0)
    used = plan.rows[plan.rows != FILLER]
    size = min(len(lengths), sample * batch_size)
    assert len(set(used)) == len(used) == size and len(plan) == -(-size // batch_size) <= sample
    assert (drawn(sample, seed=7, epoch=3).rows == plan.rows).all()
    larger = drawn(sample + 1, seed=0, epoch=0)
    assert set(used) <= set(larger.rows.ravel()) and larger.buckets == plan.buckets


@pytest.mark.parametrize(("name", "arranged"), [("sorted", np.sort), ("as drawn", np.asarray), ("twice", np.tile)])
@pytest.mark.parametrize("batches", [2, 8, 32])
def test_a_samples_mean_length_is_the_sets_within_its_error(name, arranged, batches):
    """Over 40 sets: the mean of the difference in standard errors is near 0, and its spread near 1."""
    off = []
    for seed in range(40):
        lengths = np.random.default_rng(seed).lognormal(4.5, 0.8, 1000).astype(int) + 8
        lengths = np.tile(np.sort(lengths)[::-1], 2) if name == "twice" else arranged(lengths)
        plan = batch_plan(lengths, lengths, 8, seed=seed, epoch=0, shuffle=False, sample=batches)
        found = lengths[plan.rows.ravel()]
        off.append((found.mean() - lengths.mean()) / (lengths.std() / np.sqrt(len(found))))
    # One order serves all sets of a size: the sets differ, the drawn places don't, unless lengths are independent.
    assert abs(np.mean(off)) < 2.5 and np.std(off) < 1.5, (np.mean(off), np.std(off))


def test_plan_is_pure_and_epochs_differ_in_order_alone():
    lengths = np.random.default_rng(0).integers(10, 200, 300)
    make = [batch_plan(lengths, lengths, 16, seed=3, epoch=epoch) for epoch in (0, 0, 1)]
    assert (make[0].rows == make[1].rows).all() and (make[0].bucket == make[1].bucket).all()
    assert make[0].buckets == make[2].buckets and len(make[0]) == len(make[2])
    assert (make[0].rows != make[2].rows).any()
    other = batch_plan(lengths, lengths, 16, seed=4, epoch=0)
    assert other.buckets == make[0].buckets and (other.rows != make[0].rows).any()
    fixed = [batch_plan(lengths, lengths, 16, seed=seed, epoch=0, shuffle=False) for seed in (0, 1)]
    assert (fixed[0].rows == fixed[1].rows).all()


def test_no_epoch_repeats_rows_of_the_last_in_a_fixed_way():
    """Over many epochs what is seen twice is spread over all rows but the few longest, which end each epoch."""
    lengths = np.random.default_rng(0).integers(10, 200, 37)
    seen = np.zeros(37)
    for epoch in range(200):
        seen += np.bincount(batch_plan(lengths, lengths, 16, seed=0, epoch=epoch).rows.ravel(), minlength=37)
    assert seen.sum() == 200 * 48 and seen.min() >= 200
    shorter = seen[lengths < np.sort(lengths)[-5]]
    assert shorter.min() > 230 and shorter.max() < 300


def _computed(lengths, edges, batch_size):
    """Columns of the plan that has these edges, counted as it is made: batch after batch."""
    home, left, columns = np.searchsorted(edges, lengths), 0, 0
    for i, edge in enumerate(edges):
        left += int((home == i).sum())
        whole = left // batch_size if i < len(edges) - 1 else -(-left // batch_size)
        columns += whole * batch_size * edge
        left -= whole * batch_size
    return columns


def test_edges_are_the_best_there_are():
    random = np.random.default_rng(1)
    for batch_size, count in itertools.product((1, 4), (1, 2, 3)):
        lengths = random.integers(1, 64, 23)
        candidates = sorted(set((-(-lengths // 8) * 8).tolist()))
        subsets = (
            [*subset, candidates[-1]]
            for size in range(count)
            for subset in itertools.combinations(candidates[:-1], size)
        )
        best = min(_computed(lengths, edges, batch_size) for edges in subsets)
        assert _computed(lengths, choose_edges(lengths, batch_size, count), batch_size) == best


def test_max_length_caps_the_last_bucket():
    assert choose_edges(np.array([509, 510]), 2, max_length=510) == [510]
    with pytest.raises(InputError, match="more than max_length"):
        batch_plan(np.array([511]), np.array([5]), 2, seed=0, epoch=0, max_length=510)


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_padding_efficiency_on_hh_harmless(shared, too_long, capsys):
    """16 pairs, rows cut to 512 tokens, at most 8 buckets: at least 0.80 real tokens, fillers counted as padding."""
    tokenizer = load_tokenizer(shared / "models/stories260K")
    records, _ = load(str(shared / "data/hh_rlhf/harmless-base"), "test")
    encoded = encode(records, tokenizer, 2, Limits(512, 192, too_long=too_long))
    pieces = encoded.piece_lens
    lengths = pieces.sum(axis=1)
    plan = batch_plan(lengths, pieces[:, 1:].sum(axis=1), 16, seed=0, epoch=0, max_buckets=8)
    efficiency = padding_efficiency(plan, lengths)
    with capsys.disabled():
        print(f"\npadding efficiency, HH harmless, {too_long}: {efficiency:.4f} in {len(plan.buckets)} buckets")
    assert len(plan.buckets) <= 8 and max(bucket.length for bucket in plan.buckets) <= 512
    assert efficiency >= 0.80


def test_padding_efficiency_by_hand():
    lengths = np.array([8, 6, 16])  # two buckets of batch 2: 2 x 8 + 2 x 16 columns, or one: 4 x 16
    plan = batch_plan(lengths, lengths, 2, seed=0, epoch=0, shuffle=False)
    assert padding_efficiency(plan, lengths) == 30 / 48
    lengths = np.array([8, 6, 8, 16])  # the third short row travels with the long one
    assert padding_efficiency(batch_plan(lengths, lengths, 2, seed=0, epoch=0), lengths) == 38 / 48


def test_bad_sizes():
    with pytest.raises(InputError, match="batch_size 0"):
        batch_plan(np.array([1]), np.array([1]), 0, seed=0, epoch=0)
    with pytest.raises(InputError, match="no rows"):
        batch_plan(np.array([]), np.array([]), 1, seed=0, epoch=0)


@given(count=st.integers(1, 60), size=st.integers(0, 70))
@settings(max_examples=60, deadline=None)
def test_property_sampled_rows_are_some_of_all_in_their_order_and_nested(count, size):
    rows = sample_rows(count, size).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(size, count) and set(rows) <= set(range(count))
    assert set(rows) <= set(sample_rows(count, size + 1).tolist())


def test_sampled_rows_are_no_stretch_of_the_data():
    """Of rows that are sorted by anything, the sample's mean place is the middle, within its error."""
    for count in (100, 577, 5000):
        rows = sample_rows(count, 64)
        error = count / np.sqrt(12 * 64)
        assert abs(rows.mean() - (count - 1) / 2) < 3 * error and np.diff(rows).max() > 1


def test_an_ordered_plan_meets_rows_in_exactly_their_order():
    lengths = np.asarray([10, 40, 12, 9, 33, 11, 8])
    order = np.asarray([3, 1, 6, 0, 2, 4, 5])
    found = ordered_plan(lengths, lengths // 2, 2, order, max_buckets=2, multiple=8)
    assert [bucket.length for bucket in found.buckets] == [16, 40]
    # The last batch would hold row 5 alone: the row before it comes along.
    assert found.rows.tolist() == [[3, 1], [6, 0], [2, 4], [4, 5]]
    assert found.bucket.tolist() == [1, 0, 1, 1]  # of the longest row of each
    few = ordered_plan(lengths[:3], lengths[:3] // 2, 8, np.asarray([2, 0, 1]))
    assert few.rows.tolist() == [[2, 0, 1, 2, 0, 1, 2, 0]]
    with pytest.raises(InputError, match="an order of 7 rows; expected each of the 7 once"):
        ordered_plan(lengths, lengths, 2, np.zeros(7, int))
