"""Row lengths enter, real and drawn; that a plan is a partition, fixed in shape, and well filled is checked."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_jax.data.encode import Limits, encode
from mpo_jax.data.plan import FILLER, batch_plan, choose_edges, padding_efficiency
from mpo_jax.data.sources import load
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=80),
    batch_size=st.integers(1, 9),
    max_buckets=st.integers(1, 8),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_property_every_row_is_used_once_and_fits(lengths, batch_size, max_buckets, epoch):
    lengths = np.array(lengths)
    windows = lengths // 2
    plan = batch_plan(lengths, windows, batch_size, seed=1, epoch=epoch, max_buckets=max_buckets)
    used = plan.rows[plan.rows != FILLER]
    assert sorted(used.tolist()) == list(range(len(lengths)))
    assert len(plan.buckets) <= max_buckets and sum(bucket.rows for bucket in plan.buckets) == len(lengths)
    for bucket, rows in zip(plan.bucket, plan.rows, strict=True):
        rows, shape = rows[rows != FILLER], plan.buckets[bucket]
        assert len(rows) and (lengths[rows] <= shape.length).all() and (windows[rows] <= shape.window).all()
        assert shape.length % 8 == 0 and shape.window <= shape.length
    fillers = (plan.rows == FILLER).any(axis=1)
    assert all(fillers[plan.bucket == bucket].sum() <= 1 for bucket in range(len(plan.buckets)))


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


def _computed(lengths, edges, batch_size):
    home = np.searchsorted(edges, lengths)
    return sum(-(-int((home == i).sum()) // batch_size) * batch_size * edge for i, edge in enumerate(edges))


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
    plan = batch_plan(lengths, lengths, 2, seed=0, epoch=0)
    assert padding_efficiency(plan, lengths) == 30 / 48


def test_bad_sizes():
    with pytest.raises(InputError, match="batch_size 0"):
        batch_plan(np.array([1]), np.array([1]), 0, seed=0, epoch=0)
    with pytest.raises(InputError, match="no rows"):
        batch_plan(np.array([]), np.array([]), 1, seed=0, epoch=0)
