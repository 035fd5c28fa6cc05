"""A run's data, where it lies here, enters; how long its rows are, and by how much that shortens a call, leaves.

A program is compiled for the longest rows that the settings allow. A run computes shorter ones in shorter buckets, and
its decoding ends when every reply has.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_jax import store
from mpo_jax.data import encode, reading, sources, tokenizer
from mpo_jax.data import plan as batches
from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.planning import estimate
from mpo_jax.planning.chips import Topology
from mpo_jax.planning.estimate import Assumptions, Lengths, Seconds
from mpo_jax.run import Data, sources_of
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Extent, Program

SAMPLE = 20_000
"""Records of a source that are encoded for their lengths, at most: drawn at random, the same at every plan."""
_SEED = 0x1E46


def read(run: Iterable[Job]) -> Lengths | None:
    """The lengths of what the stages read of the data; None where data or tokenizer are not here as files.

    InputError for data that a run could not read either."""
    run = list(run)
    config = run[0].config
    names = list(dict.fromkeys(name for job in run for name in sources_of(job.settings)))
    folder = Path(config.model.path).expanduser()
    paths = [(config.data.sources[name] if name else config.data).path for name in names]
    if not names or not folder.is_dir() or not all(map(_is_here, paths)):
        return None
    loaded, parts, rows = tokenizer.load_tokenizer(str(folder)), [], 0
    for name in names:
        shown, whole = jobs.dressed(run[0], loaded, name), jobs.data_division(config.data, name)
        with reading.of_source(name):
            records = sources.load(whole.path, whole.split, shown, whole.limit, whole.reading)[0]
        drawn = np.random.default_rng(_SEED).permutation(len(records))[:SAMPLE]
        parts.append(_pieces([records[index] for index in drawn], shown, config.data))
        rows += len(records)
    columns = min(part.shape[1] for part in parts)
    return Lengths(np.concatenate([part[:, :columns] for part in parts]), rows)


def _is_here(path: str) -> bool:
    return bool(path) and not store.is_remote(path) and Path(path).expanduser().exists()


def _pieces(records: Sequence[TextRecord], shown: Any, data: Data) -> np.ndarray:
    """i64 [rows, 1 + replies], with as many replies as the records have, two at most."""
    limits = encode.Limits(data.max_length, data.max_response, data.max_prompt or None, data.too_long)
    for replies in (2, 1):
        try:
            return encode.encode(records, shown, replies, limits).piece_lens
        except InputError:  # no record has so many
            continue
    return encode.encode(records, shown, 0, limits).piece_lens


def shares(
    job: Job, program: Program, seconds: Seconds, topology: Topology, assumptions: Assumptions
) -> tuple[float, float]:
    """Of the seconds that a call with the longest rows takes, the part that a call takes on average: at least, and at
    most. Both are equal where the data says all. Of what it does not say, a prompt and a reply have one token at least.
    """
    extent, data = program.extent, job.config.data

    def mean(tokens: np.ndarray, steps: int) -> float:
        edges = batches.choose_edges(tokens, job.settings.batch_size, data.max_buckets, data.multiple, extent.length)
        counts = np.bincount(np.searchsorted(edges, tokens), minlength=len(edges))
        took = [
            estimate.scaled(seconds, extent, _shorter(extent, edge, steps), job.mesh, topology, assumptions).total
            for edge in edges
        ]
        return float(np.average(took, weights=counts)) / seconds.total

    if not seconds.total:
        return 1.0, 1.0
    least, most = (mean(*end) for end in _ends(job, extent, assumptions.lengths))
    return min(least, most), most


def _ends(job: Job, extent: Extent, lengths: Lengths | None) -> list[tuple[np.ndarray, int]]:
    """Tokens of the rows, and steps of a decode loop: as few as may be, and as many."""
    decodes = extent.kind == "decode"
    room = extent.length - (0 if decodes else extent.window)
    prompts = [np.array([1]), np.array([room])]
    if lengths is not None:
        prompts = [np.minimum(lengths.pieces[:, 0], room)] * 2
    if decodes:
        return list(zip(prompts, [getattr(job.settings, "min_new_tokens", 0) or 1, extent.steps], strict=True))
    replies: list[Any] = [1, extent.window]
    said = _replies(job, extent)
    if lengths is not None and 0 < said < lengths.pieces.shape[1]:
        replies = [lengths.pieces[:, 1 : 1 + said].sum(axis=1)] * 2
    return [(np.minimum(each + reply, extent.length), 0) for each, reply in zip(prompts, replies, strict=True)]


def _replies(job: Job, extent: Extent) -> int:
    """How many replies of a row are the data's own; 0 where a policy samples them."""
    stage, data = job.settings, job.config.data
    samples = getattr(stage, "samples_pairs", hasattr(stage, "max_new_tokens"))
    if samples or shapes.made_by_stage(job, "pairs") is not None:
        return 0
    return 1 if extent.window < 2 * data.max_response else 2


def _shorter(extent: Extent, length: int, steps: int) -> Extent:
    """The same call for rows of so many tokens."""
    if extent.kind == "decode":
        return extent.resized(int(length), extent.window * steps // extent.steps, steps)
    return extent.resized(int(length), max(1, extent.window * int(length) // extent.length), 0)
