"""Row lengths, a seed and an epoch enter; the epoch's batches leave: which rows, in which static shape, in which order.

A pure function, so every host holds the same plan and a run resumes from its step number alone.
"""

import dataclasses

import numpy as np

from mpo_jax.errors import InputError

FILLER = -1
"""Stands in a plan for a row that only fills the last batch of a bucket; its weight is 0."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A static shape. length: T, the columns of its rows. window: see `types.Batch.window`. rows: how many it holds."""

    length: int
    window: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One epoch. bucket: i32 [batches], an index into `buckets`. rows: i32 [batches, batch size], FILLER where none."""

    buckets: tuple[Bucket, ...]
    bucket: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.bucket)


def choose_edges(
    lengths: np.ndarray, batch_size: int, max_buckets: int = 8, multiple: int = 8, max_length: int | None = None
) -> list[int]:
    """The row lengths of at most `max_buckets` buckets that compute the fewest tokens in an epoch, fillers included.

    lengths: int [rows]. Every edge is a multiple of `multiple` (or max_length, if that is smaller). Exact, by dynamic
    programming over the edges that some row needs: O(buckets * edges^2).
    """
    tops = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    if max_length is not None:
        tops = np.minimum(tops, max_length)
    edges, counts = np.unique(tops, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # rows that end at or before each edge
    # cost[i, j]: tokens computed by one bucket for the rows above edge i - 1, up to edge j - 1
    rows = np.maximum(below[None, :] - below[:, None], 0)
    cost = -(-rows // batch_size) * batch_size * np.concatenate([[0], edges])[None, :]
    cost = np.where(np.tri(len(below), dtype=bool), np.iinfo(np.int64).max // 4, cost)
    best, cuts = cost[0], []
    best[0] = 0
    choices = [best]
    for _ in range(1, max_buckets):
        total = choices[-1][:, None] + cost
        cuts.append(total.argmin(axis=0))
        choices.append(total.min(axis=0))
    used = int(np.argmin([choice[-1] for choice in choices]))  # the fewest buckets that reach the optimum
    end, result = len(edges), []
    for step in range(used, -1, -1):
        result.append(int(edges[end - 1]))
        end = int(cuts[step - 1][end]) if step else 0
    return result[::-1]


def batch_plan(
    lengths: np.ndarray,
    windows: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    max_buckets: int = 8,
    multiple: int = 8,
    max_length: int | None = None,
    shuffle: bool = True,
) -> Plan:
    """The batches of one epoch: every row exactly once, the last batch of a bucket filled up with FILLER.

    lengths: int [rows], real tokens of each row. windows: int [rows], its response tokens, which stand side by side.
    batch_size: rows of a global batch. The buckets and the number of batches do not depend on seed and epoch; the
    order of rows and batches is drawn from Philox(seed, epoch), or is the rows' own without `shuffle`.

    Raises InputError for a batch size below 1 and for no rows.
    """
    lengths, windows = np.asarray(lengths), np.asarray(windows)
    if batch_size < 1 or max_buckets < 1 or multiple < 1:
        raise InputError(
            f"batch_size {batch_size}, max_buckets {max_buckets}, multiple {multiple}: each must be at least 1"
        )
    if not len(lengths):
        raise InputError("no rows to plan batches for")
    edges = choose_edges(lengths, batch_size, max_buckets, multiple, max_length)
    if lengths.max() > edges[-1]:
        raise InputError(f"a row has {lengths.max()} tokens, more than max_length {max_length}")
    home = np.searchsorted(edges, lengths)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    buckets, owner, rows = [], [], []
    for index, edge in enumerate(edges):
        members = np.flatnonzero(home == index)
        window = int(windows[members].max())
        window = min(-(-window // multiple) * multiple, edge)
        buckets.append(Bucket(edge, window, len(members)))
        if shuffle:
            members = random.permutation(members)
        filled = np.full(-(-len(members) // batch_size) * batch_size, FILLER)
        filled[: len(members)] = members
        rows.append(filled.reshape(-1, batch_size))
        owner.append(np.full(len(rows[-1]), index))
    order = np.arange(sum(map(len, rows)))
    if shuffle:
        order = random.permutation(order)
    return Plan(
        tuple(buckets), np.concatenate(owner)[order].astype(np.int32), np.concatenate(rows)[order].astype(np.int32)
    )


def padding_efficiency(plan: Plan, lengths: np.ndarray) -> float:
    """Real tokens over computed tokens in an epoch; filler rows count as padding."""
    real = np.asarray(lengths)[plan.rows[plan.rows != FILLER]].sum()
    computed = sum(plan.buckets[bucket].length * plan.rows.shape[1] for bucket in plan.bucket)
    return float(real / computed)
