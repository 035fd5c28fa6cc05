"""Row lengths, a seed and an epoch enter; the epoch's batches leave: which rows, in which static shape, in which order.

A pure function, so every host holds the same plan and a run resumes from its step number alone.
"""

import dataclasses

import numpy as np

from mpo_jax.errors import InputError

FILLER = -1
"""Stands in a plan for a row that only fills the last batch of a scoring or an evaluation; its weight is 0."""

_SAMPLE = 0x5A3B1E
"""Key of the order that samples are drawn in: no run's seed, so that all stages are judged on the same rows."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A static shape. length: T, the columns of its rows. window: see `types.Batch.window`. rows: how many need it,
    being too long for the bucket before; rows that were left there may come along."""

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
    """The row lengths of at most `max_buckets` buckets that compute the fewest tokens in an epoch.

    What is left of a bucket travels in the next longer one, so that only whole batches count, and the longest bucket's
    last. lengths: int [rows]. Every edge is a multiple of `multiple` (or max_length, if that is smaller). Exact, by
    dynamic programming over the edges that some row needs: O(buckets * edges^2).
    """
    tops = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    if max_length is not None:
        tops = np.minimum(tops, max_length)
    edges, counts = np.unique(tops, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # rows that end at or before each edge
    whole = below // batch_size  # batches that are full at or before each edge
    whole[-1] = -(-below[-1] // batch_size)
    # cost[i, j]: tokens computed by one bucket whose shorter neighbour ends at edge i - 1, and that ends at edge j - 1
    batches = np.maximum(whole[None, :] - whole[:, None], 0)
    cost = batches * batch_size * np.concatenate([[0], edges])[None, :]
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
    sample: int | None = None,
    drawn: np.ndarray | None = None,
) -> Plan:
    """The batches of one epoch, each of them full: what is left of a bucket travels in the next longer one.

    With `shuffle`, for training: what is left of the epoch, less than a batch, is completed by other rows of the
    epoch, which are then seen twice in it; of fewer rows than a batch holds, each is repeated. The order of rows and
    batches is drawn from Philox(seed, epoch). Without it, for scoring and evaluation: every row exactly once, in the
    rows' own order within a bucket, and the last batch of the longest bucket filled up with FILLER. Buckets and the
    number of batches do not depend on seed and epoch.

    lengths: int [rows], real tokens of each row. windows: int [rows], its response tokens, which stand side by side.
    batch_size: rows of a global batch. sample: so many batches at most, of rows that are drawn from all at random, the
    same for every seed and epoch, and each sample within every larger one; in the buckets of the whole. drawn: the
    epoch's rows where they are not each row once (`mixture.draw`), as many in every epoch.

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
    buckets = _buckets(edges, home, windows, multiple)
    used = np.arange(len(lengths)) if drawn is None else drawn
    used = used if sample is None else sample_rows(len(lengths), sample * batch_size)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))) if shuffle else None
    owner, rows = [], []
    left = used[:0]
    for index in range(len(edges)):
        members = used[home[used] == index]
        left = np.concatenate([left, members if random is None else random.permutation(members)])
        whole = len(left) // batch_size * batch_size
        rows.append(left[:whole].reshape(-1, batch_size))
        left = left[whole:]
        if len(left) and index == len(edges) - 1:
            rows[-1] = np.concatenate([rows[-1], _completed(left, used, batch_size, random)[None]])
        owner.append(np.full(len(rows[-1]), index))
    order = np.arange(sum(map(len, rows)))
    if random is not None:
        order = random.permutation(order)
    return Plan(buckets, np.concatenate(owner)[order].astype(np.int32), np.concatenate(rows)[order].astype(np.int32))


def ordered_plan(
    lengths: np.ndarray,
    windows: np.ndarray,
    batch_size: int,
    order: np.ndarray,
    *,
    max_buckets: int = 8,
    multiple: int = 8,
    max_length: int | None = None,
) -> Plan:
    """The batches of an epoch in exactly the order given, the same in every epoch: each holds the next rows, in the
    bucket of the longest of them; the last is completed by the rows before it (of fewer rows than a batch, repeated).

    order: int [rows], a permutation of them. The rest as in `batch_plan`, in whose buckets they are. Rows of all
    lengths meet in a batch, so that more of it is padding.
    """
    lengths, windows, order = np.asarray(lengths), np.asarray(windows), np.asarray(order)
    if sorted(order.tolist()) != list(range(len(lengths))):
        raise InputError(f"an order of {len(order)} rows; expected each of the {len(lengths)} once")
    edges = choose_edges(lengths, batch_size, max_buckets, multiple, max_length)
    home = np.searchsorted(edges, lengths)
    rows = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    if len(order) % batch_size:
        last = order[-batch_size:] if len(order) > batch_size else np.resize(order, batch_size)
        rows = np.concatenate([rows, last[None]])
    return Plan(
        _buckets(edges, home, windows, multiple), home[rows].max(axis=1).astype(np.int32), rows.astype(np.int32)
    )


def sample_rows(count: int, size: int) -> np.ndarray:
    """`size` of `count` rows (or all), drawn at random, in their own order: a fair sample of data in any order. Each
    lies within every larger one of the same rows."""
    random = np.random.Generator(np.random.Philox(key=np.array([_SAMPLE, count], np.uint64)))
    return np.sort(random.permutation(count)[:size])


def _buckets(edges: list[int], home: np.ndarray, windows: np.ndarray, multiple: int) -> tuple[Bucket, ...]:
    """Each bucket's window covers the rows of all shorter ones too, which may travel in it."""
    found = []
    for index, edge in enumerate(edges):
        window = int(windows[home <= index].max())
        found.append(Bucket(edge, min(-(-window // multiple) * multiple, edge), int((home == index).sum())))
    return tuple(found)


def _completed(left: np.ndarray, used: np.ndarray, batch_size: int, random: np.random.Generator | None) -> np.ndarray:
    """One batch that begins with the rows that are left: filled up, or completed by other rows of the epoch."""
    if random is None:
        return np.concatenate([left, np.full(batch_size - len(left), FILLER)])
    others = random.permutation(np.setdiff1d(used, left))
    return np.resize(np.concatenate([left, others]), batch_size)  # begins again where even those are too few


def padding_efficiency(plan: Plan, lengths: np.ndarray) -> float:
    """Real tokens over computed tokens in an epoch; filler rows count as padding, repeated ones don't."""
    real = np.asarray(lengths)[plan.rows[plan.rows != FILLER]].sum()
    computed = sum(plan.buckets[bucket].length * plan.rows.shape[1] for bucket in plan.bucket)
    return float(real / computed)
