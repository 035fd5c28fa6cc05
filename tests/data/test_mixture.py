"""Rows of several sources and weights enter; what training draws, over many epochs, is counted."""

import collections

import numpy as np
import pytest

from mpo_jax.data import encode, mixture
from mpo_jax.data.encode import Limits, Mixture
from mpo_jax.data.loader import Loader
from mpo_jax.data.records import TextRecord
from mpo_jax.data.tokenizer import load_tokenizer
from mpo_jax.errors import InputError


def made(*sizes: int, weights=(0.7, 0.3)) -> Mixture:
    return Mixture(np.repeat(np.arange(len(sizes)), sizes), tuple(weights))


def drawn(mixed: Mixture, draws: int, seed: int = 0) -> np.ndarray:
    """Of whole epochs: within one they stand source by source, and the batch plan mixes them."""
    epochs = -(-draws // len(mixed.source))
    return np.concatenate([mixture.draw(mixed, seed, epoch) for epoch in range(epochs)])


@pytest.fixture(scope="module")
def parts(stories):
    """Two sources, of 60 and of 20 rows, their replies of different lengths."""
    tokenizer = load_tokenizer(stories)

    def encoded(name, count, reply):
        records = [TextRecord(f"{name} {n} went out.", reply * (1 + n % 3), None, n, "train") for n in range(count)]
        return encode.encode(records, tokenizer, 1, Limits(64, 32))

    return encoded("Tom", 60, " He ran."), encoded("Lily", 20, " She saw a big dog and they all smiled.")


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (2, 98), (1, 400), (0.5, 0.2, 0.3)])
def test_shares_over_ten_thousand_draws_are_the_weights(weights):
    mixed = made(*(900, 100, 40)[: len(weights)], weights=weights)
    rows = drawn(mixed, 10_000)
    share = np.bincount(mixed.source[rows]) / len(rows)
    # Rounded to whole rows in every epoch of about a thousand.
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=1e-3)


def test_every_row_of_a_source_is_drawn_before_one_is_drawn_again():
    mixed = made(90, 10)
    for source in (0, 1):
        rows = [row for row in drawn(mixed, 1000).tolist() if mixed.source[row] == source]
        for first in range(0, len(rows) - 90, 90 if source == 0 else 10):
            size = 90 if source == 0 else 10
            assert len(set(rows[first : first + size])) == size


def test_a_draw_depends_on_seed_and_epoch_alone():
    mixed = made(50, 30)
    one = [mixture.draw(mixed, 3, epoch).tolist() for epoch in (0, 1, 7)]
    assert one == [mixture.draw(mixed, 3, epoch).tolist() for epoch in (0, 1, 7)]
    assert one[0] != one[1] and one[0] != mixture.draw(mixed, 4, 0).tolist()


def test_counts_add_up_and_round_the_largest_remainders():
    assert mixture.counts(10, (1, 1, 1)) == [4, 3, 3]
    assert mixture.counts(7, (0.5, 0.25, 0.25)) == [3, 2, 2]
    assert mixture.counts(100, (0.7, 0.3)) == [70, 30]


def test_weights_in_proportion_to_the_rows_meet_every_row_once():
    mixed = made(70, 30)
    assert sorted(mixture.draw(mixed, 0, 5)) == list(range(100))


def test_a_mixture_in_full_batches(parts):
    loader = Loader(mixture.mix(parts, (1.0, 3.0)), 8, max_buckets=3)
    seen = collections.Counter()
    for step in range(10 * loader.steps_per_epoch):
        _, rows = loader.rows(step)
        assert len(rows) == 8 and (rows >= 0).all()
        seen.update((rows >= 60).tolist())
    assert seen[True] / seen.total() == 0.75
    assert loader.steps_per_epoch == 10


def test_rows_taken_of_a_mixture_keep_their_source(parts):
    mixed = mixture.mix(parts, (1.0, 3.0))
    taken = encode.take(mixed, np.array([79, 0, 61]))
    assert taken.mixture.source.tolist() == [1, 0, 1] and taken.mixture.weights == (1.0, 3.0)
    np.testing.assert_array_equal(taken.row(0)[1], parts[1].row(19)[1])
    alone = encode.take(mixed, np.arange(60)).mixture
    assert sorted(mixture.draw(alone, 0, 0)) == list(range(60)), "a source without rows leaves its part to the others"


def test_scoring_and_samples_meet_every_row_once(parts):
    mixed = mixture.mix(parts, (1.0, 3.0))
    loader = Loader(mixed, 8, shuffle=False)
    rows = np.concatenate([loader.rows(step)[1] for step in range(loader.steps_per_epoch)])
    assert sorted(rows[rows >= 0]) == list(range(80))


def test_a_weight_that_gives_no_row_is_told(parts):
    with pytest.raises(InputError, match=r"weight 0\.0001 of 1\.0001 gives none of the 80 rows of an epoch"):
        mixture.mix(parts, (1.0, 0.0001))


def test_rows_that_are_read_once_are_a_fixed_part_of_each_source(parts):
    """A weight of half the largest is half the prompts; more of it are some more; rows of a prompt stay together."""
    tom, lily = parts
    twice = encode.join(lily, lily)
    half, three_quarters, whole = (mixture.once((tom, twice), (1.0, part)) for part in (0.5, 0.75, 1.0))
    assert [len(each) for each in (half, three_quarters, whole)] == [60 + 20, 60 + 30, 60 + 40]
    assert half.mixture is None and len(mixture.once((tom, lily), (10.0, 5.0))) == 70, "weights are relative"
    for mixed in (half, three_quarters):
        assert set(tom.prompt_id) <= set(mixed.prompt_id) <= set(whole.prompt_id)
        counted = collections.Counter(mixed.prompt_id.tolist())
        assert {counted[number] for number in set(lily.prompt_id.tolist()) & set(counted)} == {2}
    assert set(half.prompt_id) < set(three_quarters.prompt_id)
    with pytest.raises(InputError, match=r"weight 0\.001, of 1 for the source .* gives none of 20 prompts"):
        mixture.once((tom, lily), (1.0, 0.001))


def test_a_prompt_alone_that_two_sources_have_is_met_once(stories):
    tokenizer = load_tokenizer(stories)
    one, other = (
        encode.encode(
            [TextRecord(f"{name} went out.", None, None, n, "train") for n, name in enumerate(names)],
            tokenizer, 0, Limits(64, 32),
        )
        for names in (("Tom", "Lily", "Ben"), ("Ben", "Sue"))
    )  # fmt: skip
    mixed = mixture.once((one, other), (1.0, 1.0))
    assert len(mixed) == 4 and len(set(mixed.prompt_id)) == 4
