"""Preference pairs, from the data or sampled by a policy, and a reward model enter; easy, hard and flipped pairs leave.

The gap of a pair is its chosen score minus its rejected one, in reward units: sigmoid(gap) is the reward model's
probability that chosen is better. Gou & Nguyen 2024 (arXiv 2403.19443): easy pairs have a large gap, hard ones a small.
No pair is scored by a reward model that was trained on it: pairs come from another share of the data, or each from the
part that one of k reward models has not seen (cross-fitting).
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from mpo_jax.data import division, encode
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import sample_rows
from mpo_jax.errors import InputError
from mpo_jax.evaluation import labellers, split_report
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import job as jobs
from mpo_jax.stages import reward, rollouts
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.types import BUCKETS, GapTable

SOURCES = ("dataset", "sampled", "both")
PAIRINGS = ("best_worst", "all")
FLIPPED = ("hard", "drop", "swap")
TABLE, PAIRS, HELDOUT, REPORT, SAMPLES = "gaps.npz", "pairs", "heldout", "report.json", "samples.json"


@dataclasses.dataclass(frozen=True)
class Scored:
    """Pairs, chosen first, with their scores f32 [pairs,2]."""

    encoded: Encoded
    scores: np.ndarray


def run(job: Job) -> dict[str, Any]:
    """Scores, divides, reports; leaves the pairs, their GapTable, held-out pairs made the same way, and plots."""
    settings = job.settings
    check(job)
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
    check_buckets(job.name, table, threshold, settings.flipped)
    report = split_report.build(table, scored.encoded, threshold)
    heldout_pairs = make("eval").encoded
    if jax.process_index() == 0:
        replace(heldout_pairs, job.folder / HELDOUT)
        replace(scored.encoded, job.folder / PAIRS)
        save_table(job.folder / TABLE, table)
        split_report.draw(job.folder, gap, report)
        jobs.write_json(job.folder / SAMPLES, split_report.samples(scored.encoded, table, tokenizer))
        jobs.write_json(job.folder / REPORT, report)
        counts = ", ".join(f"{count} {name}" for name, count in report["counts"].items())
        print(
            f"{job.name} at gap {threshold:.4g}: {counts}; the reward model agrees with "
            f"{report['agreement']:.3f} of the labels"
        )
    return {"threshold": threshold, "counts": report["counts"], "agreement": report["agreement"]}


def check(job: Job) -> None:
    """InputError for settings that can't be meant, and where a reward model has seen the pairs; nothing is loaded."""
    settings, where = job.settings, f"stages.{job.name}"
    jobs.local(job.folder)
    for name, allowed in (("pair_source", SOURCES), ("flipped", FLIPPED)):
        if settings[name] not in allowed:
            raise InputError(f"{where}.{name}: {settings[name]!r}; expected one of {', '.join(allowed)}")
    if not 0 <= settings.quantile < 1:
        raise InputError(f"{where}.quantile: {settings.quantile}; expected 0 (use threshold) or a share below 1")
    if settings.quantile == 0 and not settings.threshold > 0:
        raise InputError(f"{where}.threshold: {settings.threshold}; expected above 0, in reward units")
    if "reward" not in job.inputs:
        raise InputError(f"{where}.reward: empty; expected the reward stage that scores the pairs")
    if settings.pair_source != "dataset":
        check_sampled(job, (*labellers.LABELLERS, "reward"))
    if settings.pair_source != "sampled":
        _check_unseen(job)
    elif len(reward_models(job)) > 1:
        _check_folds(job)


def check_sampled(job: Job, known_labellers: tuple[str, ...]) -> None:
    """InputError for settings with which no pairs can be sampled."""
    settings, where = job.settings, f"stages.{job.name}"
    if "policy" not in job.inputs:
        raise InputError(f"{where}.policy: empty; expected the policy whose replies are paired")
    for name, allowed in (("pairing", PAIRINGS), ("labeller", known_labellers)):
        if settings[name] not in allowed:
            raise InputError(f"{where}.{name}: {settings[name]!r}; expected one of {', '.join(allowed)}")
    if settings.samples < 2:
        raise InputError(f"{where}.samples: {settings.samples}; a pair needs 2 or more replies to a prompt")
    if settings.label_temperature < 0:
        raise InputError(f"{where}.label_temperature: {settings.label_temperature}; expected 0 (no noise) or more")
    rollouts.sampling_config(job, settings, settings.samples)
    prompt, reply, longest = jobs.prompt_limit(job), settings.max_new_tokens, job.config.data.max_length
    if prompt + 2 * reply > longest:
        hint = f", or set data.max_prompt={longest - 2 * reply}" if longest > 2 * reply else ""
        raise InputError(
            f"{where}.max_new_tokens: prompts of {prompt} tokens and two replies of {reply} make {prompt + 2 * reply}, "
            f"above data.max_length {longest}; lower it{hint}"
        )


def reward_models(job: Job) -> list[Artifact]:
    """One, or the k of cross-fitting."""
    given: Any = job.inputs["reward"]
    return given if isinstance(given, list) else [given]


def _check_unseen(job: Job) -> None:
    """InputError where a pair would be scored by a model that was trained on it: its gap would be inflated."""
    models = reward_models(job)
    if len(models) > 1:
        _check_folds(job)
    elif job.config.stages[models[0].name].share == job.settings.share:
        raise InputError(
            f"stages.{job.name}.share: {models[0].name!r} is trained on the share {job.settings.share!r} itself, "
            "so its gaps there would be inflated; take another share, or cross-fitting (see docs/split.md)"
        )


def _check_folds(job: Job) -> None:
    names = [artifact.name for artifact in reward_models(job)]
    found = [job.config.stages[name] for name in names]
    if [(each.folds, each.fold) for each in found] != [(len(found), index) for index in range(len(found))]:
        raise InputError(
            f"stages.{job.name}.reward: {', '.join(names)}; expected the {len(names)} models of cross-fitting, with "
            f"folds={len(names)} and fold=0 to {len(names) - 1} in this order"
        )
    if {each.share for each in found} != {job.settings.share}:
        raise InputError(f"stages.{job.name}.share: {job.settings.share!r}; the folds of {names[0]} are of another")


def gap_threshold(gap: np.ndarray, threshold: float, quantile: float = 0.0) -> float:
    """The threshold itself, or the `quantile` of the gaps' sizes: that share of the pairs lies beneath it."""
    return float(np.quantile(np.abs(gap), quantile)) if quantile else float(threshold)


def buckets(gap: np.ndarray, threshold: float) -> np.ndarray:
    """i8 [pairs], an index into BUCKETS. easy: gap >= threshold; flipped: gap <= -threshold; hard: between."""
    found = np.full(len(gap), BUCKETS.index("hard"), np.int8)
    found[gap >= threshold] = BUCKETS.index("easy")
    found[gap <= -threshold] = BUCKETS.index("flipped")
    return found


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
                "and no threshold parts them: the reward model agrees with no label, or scores all pairs alike"
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
            found = dataclasses.replace(table, bucket=buckets(table.gap, rounded))
            if rounded > 0 and all(len(members(found, part, flipped)[0]) for part in ("easy", "hard")):
                return rounded
    return None


def pairs(artifact: Artifact) -> Encoded:
    """The pairs of a split artifact's part: "easy", "hard", "flipped", or "all" as the data labels them.

    Flipped pairs stand where the split's settings put them: among the hard, nowhere, or turned around among the easy.
    """
    encoded = jobs.read_rows(artifact.folder / PAIRS)
    if artifact.part == "all":
        return encoded
    table = load_table(artifact.folder / TABLE)
    rows, swapped = members(table, artifact.part, run_settings(artifact)["flipped"])
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
    """The prompts of `count` held-out pairs, a fair sample, each once."""
    found = heldout(artifact)
    prompts = encode.first_of_prompt(found)
    return encode.take(found, prompts[sample_rows(len(prompts), count)], replies=0)


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
    """`(encoded, share) -> f32 [rows,N]`, by the job's reward model; or by k of them, each row by the one that has not
    seen its prompt, and rows of other shares, which none has seen, by the mean of all."""
    models = reward_models(job)

    def scorer(artifact: Artifact):
        weights = base | jobs.load_weights(job, artifact, model, jobs.frozen_dtype(job))
        return functools.partial(reward.score_rows, job, model, weights)

    if len(models) == 1:
        score = scorer(models[0])
        return lambda encoded, share: score(encoded)

    def crossfit(encoded: Encoded, share: str) -> np.ndarray:
        found = np.zeros((len(encoded), encoded.replies), np.float32)
        parts = division.folds(encoded.prompt_id, len(models))
        for fold, artifact in enumerate(models):
            rows = np.flatnonzero(parts == fold) if share == job.settings.share else np.arange(len(encoded))
            if len(rows):
                found[rows] += scorer(artifact)(encode.take(encoded, rows))
        return found if share == job.settings.share else found / len(models)

    return crossfit


def members(table: GapTable, part: str, flipped: str) -> tuple[np.ndarray, np.ndarray]:
    """Row indices of a part, by where flipped pairs go, and which of them are turned around."""
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
        found.append(Scored(encoded, score(encoded, share)))
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
    scores = score(candidates, share)
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


def replace(encoded: Encoded, folder: epath.Path) -> None:
    """Writes rows over what a killed run may have left."""
    if folder.exists():
        folder.rmtree()
    encode.write(encoded, jobs.local(folder))
