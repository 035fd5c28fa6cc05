"""Encoded rows of several sources and their weights enter; one set of rows leaves, and the rows that an epoch draws.

An epoch draws as many rows as the sources hold together, of each source its weight's part, exactly. A source goes on in
the next epoch where it stopped: every row of it is drawn once before one is drawn again. Stages that do not train read
rows once (`once`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded, Mixture
from mpo_jax.errors import InputError


def mix(parts: Sequence[Encoded], weights: Sequence[float]) -> Encoded:
    """The rows of all parts, one after the other, of which training draws by weight. InputError where a weight is so
    small that an epoch has no row of its source."""
    source = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    total = counts(len(source), weights)
    if 0 in total:
        raise InputError(
            f"weight {weights[total.index(0)]:g} of {sum(weights):g} gives none of the {len(source)} rows of an epoch; "
            "raise it, or leave that source out"
        )
    return dataclasses.replace(encode.join(*parts), mixture=Mixture(source, tuple(weights)))


def once(parts: Sequence[Encoded], weights: Sequence[float]) -> Encoded:
    """Rows of all parts, each once: of the source with the largest weight all prompts, of another its weight's share of
    that one, as a part of its own prompts, with all their rows. Those with the lowest ids, which are hashes of prompts:
    a smaller weight takes some of what a larger one takes, whatever the seed. A prompt without replies that two sources
    have is the first one's. InputError where a weight is so small that none of a source's prompts is left."""
    kept: list[Encoded] = []
    met = np.zeros(0, np.int32)
    for part, weight in zip(parts, weights, strict=True):
        prompts = np.unique(part.prompt_id)
        count = round(weight / max(weights) * len(prompts))
        if not count:
            raise InputError(
                f"weight {weight:g}, of {max(weights):g} for the source that is read whole, gives none of "
                f"{len(prompts)} prompts; raise it, or leave that source out"
            )
        taken = np.isin(part.prompt_id, prompts[:count])
        if not part.replies:
            taken &= ~np.isin(part.prompt_id, met)
            met = np.concatenate([met, part.prompt_id[taken]])
        kept.append(encode.take(part, np.flatnonzero(taken)))
    return encode.join(*kept)


def counts(rows: int, weights: Sequence[float]) -> list[int]:
    """How many of an epoch's rows each source gives: its weight's part, rounded so that they add up (the largest
    remainders are rounded up)."""
    shares = np.asarray(weights, np.float64) / sum(weights) * rows
    whole = np.floor(shares).astype(int)
    whole[np.argsort(whole - shares, kind="stable")[: rows - int(whole.sum())]] += 1
    return whole.tolist()


def draw(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, i64 [rows], a pure function of (seed, epoch): source by source, each in its own order."""
    sources = [np.flatnonzero(mixture.source == number) for number in range(len(mixture.weights))]
    weights = [weight if len(rows) else 0.0 for weight, rows in zip(mixture.weights, sources, strict=True)]
    drawn = []
    for number, (rows, count) in enumerate(zip(sources, counts(len(mixture.source), weights), strict=True)):
        if not count:
            continue
        first = epoch * count
        passes = range(first // len(rows), (first + count - 1) // len(rows) + 1)
        stream = np.concatenate([_order(rows, seed, number, each) for each in passes])
        begin = first - passes.start * len(rows)
        drawn.append(stream[begin : begin + count])
    return np.concatenate(drawn)


def _order(rows: np.ndarray, seed: int, source: int, number: int) -> np.ndarray:
    """A source's rows in the order of its pass `number`. The key is none of `plan.batch_plan`'s."""
    key = np.array([seed + ((source + 1) << 40), number], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(rows)
