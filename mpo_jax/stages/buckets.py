"""Scored pairs enter; easy, hard and flipped ones leave, by the gap of each; and a split's artifact, part by part.

A pair's gap is its chosen score minus its rejected one, by the measure of the split: in the paper, and by default, in
reward units (Gou & Nguyen 2024, arXiv 2403.19443).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mpo_jax import artifacts
from mpo_jax.data import encode
from mpo_jax.data.division import REPORT, SELECT
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import sample_rows
from mpo_jax.errors import InputError
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import corpus
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.types import BUCKETS, LEFT_OUT, GapTable


def gap_threshold(gap: np.ndarray, threshold: float, quantile: float = 0.0) -> float:
    """The threshold itself, or the `quantile` of the gaps' sizes: that share of the pairs lies beneath it."""
    return float(np.quantile(np.abs(gap), quantile)) if quantile else float(threshold)


def top_threshold(name: str, gap: np.ndarray, count: int) -> float:
    """The `count`-th largest gap. name: the stage's. InputError where that is not above 0."""
    above = int((gap > 0).sum())
    if count > above:
        raise InputError(f"stages.{name}.top_k: {count}; expected at most {above}, the pairs whose gap is above 0")
    return float(np.sort(gap)[-count])


def buckets(gap: np.ndarray, threshold: float, band: float = 0.0) -> np.ndarray:
    """i8 [pairs], an index into BUCKETS. easy: gap >= threshold; flipped: gap <= -threshold; hard: between. LEFT_OUT:
    between, but of a size from (1 - band) * threshold up."""
    bucket = np.full(len(gap), BUCKETS.index("hard"), np.int8)
    if band:
        bucket[np.abs(gap) >= (1 - band) * threshold] = LEFT_OUT
    bucket[gap >= threshold] = BUCKETS.index("easy")
    bucket[gap <= -threshold] = BUCKETS.index("flipped")
    return bucket


def only_top(bucket: np.ndarray, gap: np.ndarray, count: int) -> np.ndarray:
    """The buckets with `count` easy pairs: of those whose gap is exactly the threshold, the first; others are hard."""
    first = np.argsort(-gap, kind="stable")[:count]
    easy = bucket == BUCKETS.index("easy")
    easy[first] = False
    return np.where(easy, np.int8(BUCKETS.index("hard")), bucket)


def agreed(bucket: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The buckets where a pair is flipped only if a second model's gap, f32 [pairs], is below 0 too, else hard."""
    alone = (bucket == BUCKETS.index("flipped")) & ~(second < 0)
    return np.where(alone, np.int8(BUCKETS.index("hard")), bucket)


def members(table: GapTable, part: str, flipped: str) -> tuple[np.ndarray, np.ndarray]:
    """Row indices of a part, by where flipped pairs go, and which of them are turned around."""
    names = [part] + (["flipped"] if (part, flipped) in (("hard", "hard"), ("easy", "swap")) else [])
    rows = np.flatnonzero(np.isin(table.bucket, [BUCKETS.index(name) for name in names]))
    turned = table.bucket[rows] == BUCKETS.index("flipped")
    return rows, turned & (part == "easy")


def check_buckets(name: str, table: GapTable, threshold: float, flipped: str) -> None:
    """InputError, suggesting a threshold, if no pair is easy or none is hard. name: the stage's."""
    for part in ("easy", "hard"):
        if len(members(table, part, flipped)[0]):
            continue
        gap = np.asarray(table.gap, np.float64)
        better = suggestion(table, flipped)
        raise InputError(
            f"stages.{name}.threshold: at {threshold:.4g} no pair is {part}; gaps run from {gap.min():.4g} to "
            f"{gap.max():.4g}, "
            + (
                "and no threshold divides them: the reward model agrees with no label, or scores all pairs alike"
                if better is None
                else f"so try --config.stages.{name}.threshold={better} --config.stages.{name}.quantile=0"
            )
        )


def suggestion(table: GapTable, flipped: str) -> float | None:
    """A threshold at which some pairs are easy and some hard, near the median size of the gaps; None where there is
    none."""
    sizes = np.sort(np.append(np.abs(table.gap), max(np.max(table.gap), 0)))
    tried = np.unique(sizes[np.linspace(0, len(sizes) - 1, 101).astype(int)])
    # Whatever parts the pairs at all, the largest gap does: rounded up it would not.
    for size in sorted([*tried, np.max(table.gap)], key=lambda size: abs(size - np.median(sizes))):
        for rounded in (float(f"{size:.4g}"), float(f"{size:.9g}")):
            tried_table = dataclasses.replace(table, bucket=buckets(table.gap, rounded))
            if rounded > 0 and all(len(members(tried_table, part, flipped)[0]) for part in ("easy", "hard")):
                return rounded
    return None


# What a stage learns from ---------------------------------------------------------------------------------------------


def pairs_for(job: Job, model: ModelConfig) -> tuple[Encoded, Encoded, Encoded]:
    """The pairs that a stage learns from, and both halves of those held out, SELECT and REPORT: of the split in its
    role `pairs`, or the data's own."""
    if "pairs" in job.inputs:
        split = job.inputs["pairs"]
        return pairs(split), heldout(split, SELECT), heldout(split, REPORT)
    tokenizer = jobs.load_tokenizer(job, model)
    train, select, report = (corpus.share_pairs(job, model, tokenizer, share) for share in ("policy", SELECT, REPORT))
    return train, select, report


def prompts_for(job: Job, model: ModelConfig, tokenizer, count: int) -> tuple[Encoded, Encoded]:
    """The prompts that a stage samples on, each once, and `count` held-out ones of the half SELECT: of the split in its
    role `prompts`, or the data's own."""
    if "prompts" in job.inputs:
        return prompts(job.inputs["prompts"]), heldout_prompts(job.inputs["prompts"], SELECT, count)
    train, held = (corpus.share_prompts(job, model, tokenizer, share) for share in ("policy", SELECT))
    return train, encode.take(held, sample_rows(len(held), count))


# A split's artifact ---------------------------------------------------------------------------------------------------


def pairs(artifact: Artifact) -> Encoded:
    """The pairs of a split artifact's part: "easy", "hard", "flipped", or "all" as the data labels them.

    Flipped pairs stand where the split's settings put them: among the hard, nowhere, or turned around among the easy.
    """
    encoded = corpus.read_rows(artifact.folder / artifacts.PAIR_ROWS)
    return encoded if artifact.part == "all" else encode.take(encoded, *_chosen(artifact))


def gaps(artifact: Artifact) -> np.ndarray:
    """f32 [pairs]: the gap of each of `pairs(artifact)`, of one that stands turned around with its sign changed."""
    gap = artifacts.read_gaps(artifact.folder).gap
    if artifact.part == "all":
        return gap
    rows, turned = _chosen(artifact)
    return np.where(turned, -gap[rows], gap[rows])


def _chosen(artifact: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a part, and which are turned around. InputError for a part without any."""
    rows, turned = members(artifacts.read_gaps(artifact.folder), artifact.part, _flipped(artifact))
    if not len(rows):
        raise InputError(f"{artifact.name}/{artifact.part} is empty; change the split's threshold")
    return rows, turned


def chosen(encoded: Encoded) -> Encoded:
    """The rows with their chosen replies alone."""
    return encode.take(encoded, np.arange(len(encoded)), replies=1)


def prompts(artifact: Artifact) -> Encoded:
    """The prompts of a part, each once by its prompt id."""
    encoded = pairs(artifact)
    return encode.take(encoded, encode.first_of_prompt(encoded), replies=0)


def heldout(artifact: Artifact, half: str) -> Encoded:
    """Pairs of one half of the eval share, SELECT or REPORT of `data.division`, made as the split's own."""
    return corpus.read_rows(artifact.folder / artifacts.HELDOUT / half)


def heldout_buckets(artifact: Artifact, half: str) -> np.ndarray | None:
    """i8 [pairs]: the bucket of each of `heldout(artifact, half)`, by the split's own scorer and threshold; None where
    the split has not divided them: its data gave them no margins, or an earlier version made it."""
    folder = artifact.folder / artifacts.HELDOUT / half
    return artifacts.read_gaps(folder).bucket if (folder / artifacts.GAPS).exists() else None


def heldout_prompts(artifact: Artifact, half: str, count: int) -> Encoded:
    """The prompts of `count` held-out pairs, a fair sample, each once."""
    encoded = heldout(artifact, half)
    prompts = encode.first_of_prompt(encoded)
    return encode.take(encoded, prompts[sample_rows(len(prompts), count)], replies=0)


def _flipped(artifact: Artifact) -> str:
    """Where the split that left an artifact put its flipped pairs."""
    return artifacts.read_json(artifact.folder / artifacts.CONFIG)["stages"][artifact.name]["flipped"]


def rows_of(role: str) -> Callable[[Job, int, float], float]:
    """The rows that a stage reads whose `role` names a part of a split, for the plan: see `base.Stage.rows`."""

    def rows(job: Job, pairs: int, easy: float) -> float:
        artifact = job.inputs.get(role)
        if artifact is None:
            return pairs * job.config.data.shares.policy
        part = {"easy": easy, "hard": 1 - easy}.get(artifact.part, 1.0)
        share = getattr(job.config.stages[artifact.name], "share", "policy")  # a plugin's kind may have none
        return pairs * dict(job.config.data.shares)[share] * part

    return rows
