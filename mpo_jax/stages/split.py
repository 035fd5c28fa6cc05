"""Preference pairs, from the data or sampled by a policy, and a reward model enter; easy, hard and flipped pairs leave.

The gap of a pair is its chosen score minus its rejected one, in reward units: sigmoid(gap) is the reward model's
probability that chosen is better. Gou & Nguyen 2024 (arXiv 2403.19443): easy pairs have a large gap, hard ones a small.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.errors import InputError
from mpo_jax.evaluation import labellers, plots
from mpo_jax.evaluation import pairs as pair_tables
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import job as jobs
from mpo_jax.stages import reward, rollouts
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.types import BUCKETS, GapTable

SOURCES = ("dataset", "sampled", "both")
PAIRINGS = ("best_worst", "all")
FLIPPED = ("hard", "drop", "swap")
TABLE, PAIRS, HELDOUT, REPORT = "gaps.npz", "pairs", "heldout", "report.json"


@dataclasses.dataclass(frozen=True)
class Scored:
    """Pairs, chosen first, with their scores f32 [pairs,2]."""

    encoded: Encoded
    scores: np.ndarray


def run(job: Job) -> dict[str, Any]:
    """Scores, divides, reports; leaves the pairs, their GapTable, held-out pairs made the same way, and plots."""
    settings = job.settings
    check(settings)
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    base = jobs.base_weights(job, model)
    score = make_scorer(job, model, base)
    make = functools.partial(_scored_pairs, job, model, tokenizer, base, score)
    scored = make(settings.share)
    gap = scored.scores[:, 0] - scored.scores[:, 1]
    threshold = gap_threshold(gap, settings.threshold, settings.quantile)
    table = GapTable(
        id=scored.encoded.id,
        prompt_id=scored.encoded.prompt_id,
        score_chosen=scored.scores[:, 0],
        score_rejected=scored.scores[:, 1],
        gap=gap,
        bucket=buckets(gap, threshold),
    )
    check_buckets(table, threshold, settings.flipped)
    report = _report(scored, table, threshold)
    heldout_pairs = make("eval").encoded
    if jax.process_index() == 0:
        replace(heldout_pairs, job.folder / HELDOUT)
        replace(scored.encoded, job.folder / PAIRS)
        save_table(job.folder / TABLE, table)
        _draw(job.folder, table, report)
        samples = _samples(scored.encoded, table, tokenizer)
        jobs.write_json(job.folder / "samples.json", samples)
        jobs.write_json(job.folder / REPORT, report)
        counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
        print(
            f"split at gap {threshold:.4g}: {counts}; the reward model agrees with {report['agreement']:.3f} of labels"
        )
    return {"threshold": threshold, "counts": report["counts"], "agreement": report["agreement"]}


def check(settings) -> None:
    """InputError for settings that can't be meant."""
    for name, allowed in (("pair_source", SOURCES), ("pairing", PAIRINGS), ("flipped", FLIPPED)):
        if settings[name] not in allowed:
            raise InputError(f"{name}: {settings[name]!r}; expected one of {', '.join(allowed)}")
    if settings.pair_source != "dataset" and settings.samples < 2:
        raise InputError(
            f"samples: {settings.samples} with pair_source {settings.pair_source!r}; a pair needs 2 or more"
        )
    if not 0 <= settings.quantile < 1:
        raise InputError(f"quantile: {settings.quantile}; expected 0 (use threshold) or a share below 1")
    if settings.quantile == 0 and not settings.threshold > 0:
        raise InputError(f"threshold: {settings.threshold}; expected above 0, in reward units")


def gap_threshold(gap: np.ndarray, threshold: float, quantile: float = 0.0) -> float:
    """The threshold itself, or the `quantile` of the gaps' sizes: that share of the pairs lies beneath it."""
    return float(np.quantile(np.abs(gap), quantile)) if quantile else float(threshold)


def buckets(gap: np.ndarray, threshold: float) -> np.ndarray:
    """i8 [pairs], an index into BUCKETS. easy: gap >= threshold; flipped: gap <= -threshold; hard: between."""
    found = np.full(len(gap), BUCKETS.index("hard"), np.int8)
    found[gap >= threshold] = BUCKETS.index("easy")
    found[gap <= -threshold] = BUCKETS.index("flipped")
    return found


def check_buckets(table: GapTable, threshold: float, flipped: str) -> None:
    """InputError, suggesting a threshold, if no pair is easy or none is hard."""
    for name in ("easy", "hard"):
        if not len(_members(table, name, flipped)[0]):
            middle = float(np.median(np.abs(table.gap)))
            raise InputError(
                f"threshold: at {threshold:.4g} no pair is {name}; sizes of gaps run from "
                f"{float(np.abs(table.gap).min()):.4g} to {float(np.abs(table.gap).max()):.4g}, "
                f"half of them above {middle:.4g}: try --config.stages.NAME.threshold={middle:.3g}, or quantile=0.5"
            )


def pairs(artifact: Artifact) -> Encoded:
    """The pairs of a split artifact's part: "easy", "hard", "flipped", or "all" as the data labels them.

    Flipped pairs stand where the split's settings put them: among the hard, nowhere, or turned around among the easy.
    """
    encoded = jobs.read_rows(artifact.folder / PAIRS)
    if artifact.part == "all":
        return encoded
    table = load_table(artifact.folder / TABLE)
    rows, swapped = _members(table, artifact.part, run_settings(artifact)["flipped"])
    if not len(rows):
        raise InputError(f"{artifact.name}/{artifact.part} is empty; change the split's threshold")
    return encode.take(encoded, rows, swapped)


def prompts(artifact: Artifact) -> Encoded:
    """The prompts of a part, each once by its prompt id."""
    found = pairs(artifact)
    return encode.take(found, encode.first_of_prompt(found), replies=0)


def heldout(artifact: Artifact) -> Encoded:
    """Pairs of the eval share, made as the split's own."""
    return jobs.read_rows(artifact.folder / HELDOUT)


def heldout_prompts(artifact: Artifact, count: int) -> Encoded:
    """The prompts of the first `count` held-out pairs, each once."""
    found = heldout(artifact)
    return encode.take(found, encode.first_of_prompt(found)[:count], replies=0)


def run_settings(artifact: Artifact) -> dict[str, Any]:
    """The settings that a split ran with."""
    return json.loads((artifact.folder / "config.json").read_text())["stages"][artifact.name]


def save_table(path: epath.Path, table: GapTable) -> None:
    with path.open("wb") as file:
        np.savez(file, **{field.name: getattr(table, field.name) for field in dataclasses.fields(table)})


def load_table(path: epath.Path) -> GapTable:
    with path.open("rb") as file, np.load(file) as arrays:
        return GapTable(**{name: arrays[name] for name in arrays.files})


def make_scorer(job: Job, model: ModelConfig, base):
    """`(encoded) -> f32 [rows,N]`, by the job's reward model."""
    weights = base | jobs.load_weights(job, job.inputs["reward"], model, jobs.frozen_dtype(job))
    return functools.partial(reward.score_rows, job, model, weights)


def _members(table: GapTable, part: str, flipped: str) -> tuple[np.ndarray, np.ndarray]:
    """Row indices of a part, and which of them are turned around."""
    names = [part] + (["flipped"] if (part, flipped) in (("hard", "hard"), ("easy", "swap")) else [])
    rows = np.flatnonzero(np.isin(table.bucket, [BUCKETS.index(name) for name in names]))
    turned = table.bucket[rows] == BUCKETS.index("flipped")
    return rows, turned & (part == "easy")


def _scored_pairs(job: Job, model: ModelConfig, tokenizer, base, score, share: str) -> Scored:
    """The share's pairs by the settings' source, scored."""
    source = job.settings.pair_source
    found = []
    if source in ("dataset", "both"):
        encoded = jobs.share_pairs(job, model, tokenizer, share)
        found.append(Scored(encoded, score(encoded)))
    if source in ("sampled", "both"):
        found.append(sampled_pairs(job, model, tokenizer, base, score, share))
    if len(found) == 1:
        return found[0]
    return Scored(encode.join(found[0].encoded, found[1].encoded), np.concatenate([each.scores for each in found]))


def sampled_pairs(job: Job, model: ModelConfig, tokenizer, base, score, share: str) -> Scored:
    """Pairs of the policy's own replies to a share's prompts; the winner is the reward model's, or a labeller's."""
    settings = job.settings
    encoded = jobs.share_prompts(job, model, tokenizer, share)
    weights = base | jobs.load_weights(job, job.inputs["policy"], model, jobs.frozen_dtype(job))
    how = rollouts.sampling_config(job, settings, settings.samples)
    replies = rollouts.sample_all(job, model, weights, encoded, how, settings.batch_size, job.seed)
    candidates = with_replies(encoded, replies.tokens)
    scores = score(candidates)
    gold = scores
    if settings.labeller != "reward":
        texts = [text for row in replies.texts(tokenizer) for text in row]
        gold = labellers.score(settings.labeller, texts).reshape(scores.shape)
    return pair_up(candidates, scores, gold, settings, job.seed)


def with_replies(prompts: Encoded, replies: list[list[np.ndarray]]) -> Encoded:
    """Prompts with their sampled replies, rows of n."""
    pieces = [piece for row, each in enumerate(replies) for piece in (prompts.row(row)[0], *each)]
    return encode.assemble(
        pieces, len(replies[0]), prompts.conventions, prompts.key, id=prompts.id, prompt_id=prompts.prompt_id
    )


def pair_up(candidates: Encoded, scores: np.ndarray, gold: np.ndarray, settings, seed: int) -> Scored:
    """Pairs of each row's replies. best_worst: by `gold`; all: every two. Equal replies make no pair."""
    pieces: list[np.ndarray] = []
    found: list[np.ndarray] = []
    prompt_ids: list[int] = []
    for row in range(len(candidates)):
        prompt, *answers = candidates.row(row)
        order = np.argsort(-gold[row], kind="stable")
        if settings.pairing == "best_worst":
            choices = [(int(order[0]), int(order[-1]))]
        else:
            choices = [(a, b) for a in range(len(answers)) for b in range(a + 1, len(answers))]
        for a, b in choices:
            if np.array_equal(answers[a], answers[b]):
                continue
            temperature = 0.0 if settings.labeller == "reward" else settings.label_temperature
            number = np.array([len(found)])
            if not labellers.first_wins(gold[row, [a]], gold[row, [b]], temperature, number, seed)[0]:
                a, b = b, a
            pieces += [prompt, answers[a], answers[b]]
            found.append(scores[row, [a, b]])
            prompt_ids.append(candidates.prompt_id[row])
    if not found:
        raise InputError("pair_source: no two sampled replies to a prompt differ; raise temperature or samples")
    encoded = encode.assemble(
        pieces, 2, candidates.conventions, candidates.key, id=np.arange(len(found)), prompt_id=np.array(prompt_ids)
    )
    return Scored(encoded, np.array(found, np.float32))


def _report(scored: Scored, table: GapTable, threshold: float) -> dict[str, Any]:
    gap, lens = np.asarray(table.gap), scored.encoded.piece_lens
    order = np.argsort(np.abs(gap), kind="stable")
    deciles = [part for part in np.array_split(order, 10) if len(part)]
    whole = pair_tables.pair_report(scored.scores, lens[:, 1:], np.asarray(scored.encoded.confidence))
    report = {
        "threshold": threshold,
        "pairs": len(gap),
        "counts": {name: int((table.bucket == index).sum()) for index, name in enumerate(BUCKETS)},
        "agreement": whole["accuracy"],
        "agreement_by_gap_decile": [
            {
                "from": float(np.abs(gap[part]).min()),
                "to": float(np.abs(gap[part]).max()),
                "pairs": len(part),
                "agreement": pair_tables.accuracy(gap[part]),
            }
            for part in deciles
        ],
        "lengths": {
            name: {
                "prompt": float(lens[here, 0].mean()),
                "chosen": float(lens[here, 1].mean()),
                "rejected": float(lens[here, 2].mean()),
            }
            for index, name in enumerate(BUCKETS)
            if (here := table.bucket == index).any()
        },
        "scores": whole,
    }
    return report


def _draw(folder: epath.Path, table: GapTable, report: dict[str, Any]) -> None:
    gap = np.asarray(table.gap)
    plots.gap_histogram(folder / "gaps.png", gap, report["threshold"])
    plots.easy_share(folder / "easy_share.png", gap, report["threshold"])
    deciles = report["agreement_by_gap_decile"]
    labels = [f"{row['from']:.2g}-{row['to']:.2g}" for row in deciles]
    values = [row["agreement"] for row in deciles]
    plots.bars(folder / "agreement.png", labels, values, "size of the gap, by decile", "agreement with the label")
    if "by_confidence" in report["scores"]:
        rows = report["scores"]["by_confidence"]
        plots.bars(
            folder / "confidence.png",
            [f"{row['confidence']:g}" for row in rows],
            [row["accuracy"] for row in rows],
            "annotator's confidence",
            "agreement with the label",
        )


def _samples(encoded: Encoded, table: GapTable, tokenizer, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """A few pairs of each bucket, as text."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, name in enumerate(BUCKETS):
        found[name] = []
        for row in np.flatnonzero(table.bucket == index)[:count]:
            texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in encoded.row(int(row))]
            kept = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            found[name].append({"id": int(table.id[row]), "gap": float(table.gap[row])} | kept)
    return found


def replace(encoded: Encoded, folder: epath.Path) -> None:
    """Writes rows over what a killed run may have left."""
    if folder.exists():
        folder.rmtree()
    encode.write(encoded, jobs.local(folder))
