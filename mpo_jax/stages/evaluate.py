"""Policies and held-out prompts enter; a reply of each to every prompt leaves, scored, compared, and told in a table.

One file holds a line for each prompt, with every policy's reply and its scores: a judge, people and the report read
it. Another holds the means, the comparisons, and reward against KL of every policy, along a training too.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic

from mpo_jax import artifacts, metrics
from mpo_jax import settings as declared
from mpo_jax.artifacts import PAIRS, POLICY, REPLIES, REWARD
from mpo_jax.data import encode
from mpo_jax.data.division import REPORT
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import sample_rows
from mpo_jax.evaluation import judge, sections, statistics, verdict
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.scorers.names import OWN, Scorer, Scorers
from mpo_jax.settings import Count, Names, Whole, role, setting
from mpo_jax.stages import buckets, candidates, corpus, rows, scores, shards
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Sampling, Stage
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.stages.programs import Program, Programs
from mpo_jax.types import PyTree

_NGRAM, _DISTINCT = 4, 2
"""Lengths of the n-grams that repetition counts within a reply, and diversity over all of a policy's replies."""


class Settings(Sampling):
    """Policies compared by their replies to held-out prompts."""

    policies: Names = role(POLICY, ("sft", "dpo", "mpo"), "the policies that reply")
    reward: str = role(REWARD, "reward", "the reward model that scores; empty: none does", optional=True)
    baseline: str = setting("sft", "the policy that the others are compared with; empty: every two of them")
    prompts: str = role(
        PAIRS,
        "split/all",
        "the split whose held-out prompts are used; data, or empty: those of the eval share",
        optional=True,
        data=True,
    )
    count: Count = setting(128, "held-out prompts", unit="prompts")
    labeller: Annotated[Scorer, Scorers(more=("",))] = setting(
        "", "a scorer whose gold score stands beside the reward model's"
    )
    bootstrap: Count = setting(2000, "resamples of an interval")
    batch_size: Count = setting(32, "prompts sampled at a time", unit="rows")
    score_batch: Whole = setting(0, "rows scored at a time; 0: batch_size", unit="rows", operational=True)

    @pydantic.model_validator(mode="after")
    def _policies(self):
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise declared.wrong("policies", f"{list(self.policies)}; expected at least one policy, each once")
        if self.baseline and self.baseline not in self.policies:
            raise declared.wrong("baseline", f"{self.baseline!r} is none of {', '.join(self.policies)}")
        return self

    @property
    def scored_rows(self) -> int:
        return self.score_batch or self.batch_size


def check(job: Job[Settings]) -> None:
    """InputError for sampling that the model or the mesh can't do; nothing is loaded."""
    jobs.check_batch(job, job.settings.batch_size)
    jobs.check_batch(job, job.settings.scored_rows, "score_batch")
    candidates.of_settings(job, 1)
    scores.check(job)


def programs(job: Job[Settings]) -> Programs:
    """The sampler, log-probs of its replies, and the scorers."""
    model = jobs.model(job)
    settings = job.settings
    base = jobs.abstract_base(job, model)
    weights = base | shapes.frozen_weights(job, model)
    length, window = shapes.sampled_length(job, settings, 1)
    drawn = shapes.batch(job, settings.scored_rows, length, window)
    how = candidates.of_settings(job, 1)
    compiled = {
        "sample": candidates.program(job, model, weights, how, settings.batch_size),
        "logps": rows.logps_program(job, model, weights, drawn, 1, settings.temperature),
    }
    if settings.reward:
        scorer = base | shapes.frozen_weights(job, model, head=True)
        compiled["score"] = rows.scoring_program(job, model, scorer, drawn, 1)
    return compiled | scores.programs(job, "labeller", {1: drawn})


@dataclasses.dataclass(frozen=True)
class Replied:
    """One policy's replies to every prompt. rows: prompts with one reply each. logps: f32 [prompts], summed, of the
    policy itself at the sampling temperature."""

    rows: Encoded
    tokens: list[np.ndarray]
    texts: list[str]
    finished: np.ndarray
    logps: np.ndarray


def run(job: Job[Settings]) -> dict[str, Any]:
    """Samples, scores, compares; writes both files and prints the table."""
    settings = job.settings
    policies: list[Artifact] = job.inputs["policies"]
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    base = jobs.base_weights(job, model)
    prompts = heldout_prompts(job, model, tokenizer)
    compiled = programs(job)
    truncation = candidates.of_settings(job, 1).truncation
    replied, baseline = {}, None
    for artifact in policies:
        replied[artifact.name] = _reply(job, compiled, tokenizer, model, base, artifact, prompts)
        if artifact.name == settings.baseline:
            baseline = artifact
    columns: dict[str, dict[str, np.ndarray]] = {name: _measured(each) for name, each in replied.items()}
    if baseline is not None:
        weights = _loaded(job, model, base, baseline)
        key = "log_ratio" if truncation else "kl"
        for name, each in replied.items():
            under = _rowwise(job, compiled["logps"], weights, each.rows, baseline)
            columns[name][key] = each.logps - under
    if "score" in compiled:
        reward = job.inputs["reward"]
        weights = _loaded(job, model, base, reward)
        for name, each in replied.items():
            columns[name]["reward"] = _rowwise(job, compiled["score"], weights, each.rows, reward)
    if settings.labeller:
        with scores.opened(job, "labeller", tokenizer, compiled, settings.scored_rows) as score:
            for name, each in replied.items():
                columns[name]["gold"] = score(each.rows)[:, 0]
    lines = _lines(prompts, tokenizer, replied, columns)
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "baseline": settings.baseline,
        "truncation": truncation,
        "policies": {
            name: _means(columns[name])
            | ({"kl_error": standard_error(columns[name]["kl"])} if "kl" in columns[name] else {})
            | {"distinct": distinct(replied[name].tokens, _DISTINCT)}
            for name in replied
        },
        "comparisons": compared(lines, settings.baseline, settings.bootstrap, job.seed),
    }
    report["errors"] = {
        name: {key: standard_error(values[~np.isnan(values)]) for key, values in columns[name].items()}
        for name in replied
    }
    report["frontier"] = frontier(job, report["policies"])
    subject = verdict.subject(list(replied), {each.name: artifacts.beneath(each.folder) for each in policies})
    report["verdict"] = verdict.given(lines, subject, report["policies"], settings.baseline)
    if jobs.is_first():
        artifacts.write_lines(job.folder / artifacts.REPLIES_FILE, lines)
        artifacts.write_json(job.folder / artifacts.REPORT, report)
    jobs.say(table(report))
    return {key: report[key] for key in ("prompts", "baseline", "policies")}


def heldout_prompts(job: Job, model: ModelConfig, tokenizer) -> Encoded:
    """A fair sample of `count` held-out prompts that no training has seen, nor chosen a checkpoint by: of the split
    that the stage names, or else of the data."""
    if "prompts" in job.inputs:
        return buckets.heldout_prompts(job.inputs["prompts"], REPORT, job.settings.count)
    prompts = corpus.share_prompts(job, model, tokenizer, REPORT)
    return encode.take(prompts, sample_rows(len(prompts), job.settings.count))


def compared(lines: Sequence[judge.Row], baseline: str, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Comparisons by each score, of the prompts whose replies all have it, with Holm's correction over the pairs, as
    plain data."""
    if len(lines[0]["replies"]) < 2:
        return []
    comparisons = []
    for key, by in statistics.JUDGES:
        scored = [line for line in lines if all(reply[key] is not None for reply in line["replies"].values())]
        if not scored:
            continue
        family = []
        for left, right in judge.pairs_of(scored, (), baseline):
            replies = [(line["replies"][left], line["replies"][right]) for line in scored]
            won = statistics.outcomes([a[key] for a, _ in replies], [b[key] for _, b in replies])
            lengths = np.array([a["tokens"] - b["tokens"] for a, b in replies])
            family.append(statistics.compare(left, right, by, won, lengths, resamples, seed))
        comparisons += [
            dataclasses.asdict(comparison) | {"sentence": statistics.sentence(comparison)}
            for comparison in statistics.holm(family)
        ]
    return comparisons


def frontier(job: Job, policies: Mapping[str, Mapping[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Reward-model score against KL to the baseline: of each policy, and along training of the PPO stages that logged
    both. {} where the evaluation has no baseline or no reward model. A policy's own point is its last, without a step.
    """
    points: dict[str, list[dict[str, float]]] = {}
    for artifact in job.inputs["policies"]:
        means = policies[artifact.name]
        if "kl" not in means or "reward" not in means:
            return {}
        along = _along_training(job, artifact)
        points[artifact.name] = [*along, {"kl": means["kl"], "score": means["reward"]}]
    return points


def _along_training(job: Job[Settings], artifact: Artifact) -> list[dict[str, float]]:
    """The held-out evaluations of a training that sampled, if its KL is to the baseline and its score is this reward
    model's."""
    if artifact.name == artifacts.BASE:
        return []
    settings: Any = job.config.stages[artifact.name]
    kl_to = {getattr(settings, "sft", ""): "eval/kl_sft", getattr(settings, "reference", ""): "eval/kl"}
    key = kl_to.get(job.settings.baseline, "")
    scored_by = getattr(settings, "scorer", ""), getattr(settings, "reward", "")
    if not key or scored_by != (OWN, job.settings.reward):
        return []
    read = metrics.read(artifact.folder)
    return [{"step": row["step"], "kl": row[key], "score": row["eval/score"]} for row in read if key in row]


def _means(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of what there is in each column; and how many replies have no gold score, where some have none."""
    known = {key: values[~np.isnan(values)] for key, values in columns.items()}
    missing = len(columns["gold"]) - len(known["gold"]) if "gold" in columns else 0
    means = {key: float(np.mean(values)) for key, values in known.items() if len(values)}
    return means | ({"gold_unscored": missing} if missing else {})


def standard_error(values: np.ndarray) -> float:
    """Of a mean over prompts."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def table(report: Mapping[str, Any]) -> str:
    """The policies' main figures in columns, each mean with its standard error, and the verdict in words."""
    keys = [key for key in ("gold", "reward", "kl", "log_ratio", "tokens")
            if all(key in means for means in report["policies"].values())]  # fmt: skip
    wins = {(c["left"], c["by"]): c for c in report["comparisons"] if c["right"] == report["baseline"]}
    kinds = list(dict.fromkeys(c["by"] for c in report["comparisons"]))[:1] if report["baseline"] else []
    named = {"kl": f"KL to {report['baseline']}", "log_ratio": f"log-ratio to {report['baseline']}"}
    heads = [named.get(key, key) for key in keys] + [f"wins by {by.removeprefix('the ').split()[0]}" for by in kinds]
    rows = [["policy", *heads]]
    for name, means in report["policies"].items():
        errors = report["errors"][name]
        cells = [
            f"{means[key]:.0f}" if key == "tokens" else verdict.with_error(means[key], errors[key]) for key in keys
        ]
        for by in kinds:
            c = wins.get((name, by))
            cells.append("" if c is None else f"{c['win_rate']:.2f} [{c['low']:.2f}, {c['high']:.2f}]")
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    told = []
    if "log_ratio" in keys:
        told = [f"no KL: replies were drawn with {report['truncation']}; the log-ratio's mean over them is none"]
    told += (report["verdict"] or {"sentences": []})["sentences"]
    return "\n".join([*lines, *(part for line in told for part in textwrap.wrap(line, 80, subsequent_indent="  "))])


def repetition(ids: np.ndarray, n: int = _NGRAM) -> float:
    """The share of a reply's n-grams that stood in it before."""
    grams = _ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(replies: Sequence[np.ndarray], n: int) -> float:
    """Distinct n-grams over all n-grams of all replies (Li et al. 2016): low where a policy says the same to all."""
    grams = [gram for ids in replies for gram in _ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(ids: np.ndarray, n: int) -> list[tuple[int, ...]]:
    tokens = ids.tolist()
    return list(zip(*(tokens[k:] for k in range(n)), strict=False))


def _loaded(job: Job, model: ModelConfig, base: PyTree, artifact: Artifact) -> Callable[[], PyTree]:
    """Gives a policy's weights, loaded when they are first asked for: a stage that was killed has done without."""
    return shards.loaded(lambda: base | jobs.load_weights(job, artifact, model, jobs.frozen_dtype(job)))


def _reply(
    job: Job[Settings], compiled: Programs, tokenizer, model: ModelConfig, base: PyTree, artifact: Artifact,
    prompts: Encoded,
) -> Replied:  # fmt: skip
    how = candidates.of_settings(job, 1)
    weights, of = _loaded(job, model, base, artifact), jobs.making(artifact)
    drawn = candidates.sample_all(job, compiled["sample"], weights, prompts, how, job.settings.batch_size, of)
    replied = candidates.with_replies(prompts, drawn.tokens)
    return Replied(
        replied,
        [each[0] for each in drawn.tokens],
        [each[0] for each in drawn.texts(tokenizer)],
        drawn.finished[:, 0],
        _rowwise(job, compiled["logps"], weights, replied, artifact),
    )


def _rowwise(
    job: Job[Settings], program: Program, weights: Callable[[], PyTree], encoded: Encoded, artifact: Artifact
) -> np.ndarray:
    """The program's number of every row, f32 [rows]. weights: of the artifact."""
    return rows.compute(job, program, weights, encoded, job.settings.scored_rows, jobs.making(artifact))[:, 0]


def _measured(replied: Replied) -> dict[str, np.ndarray]:
    """What needs no other model, a number for each reply."""
    return {
        "tokens": np.array([len(ids) for ids in replied.tokens]),
        "finished": replied.finished.astype(np.float64),
        "repetition": np.array([repetition(ids) for ids in replied.tokens]),
    }


def _lines(prompts: Encoded, tokenizer, replied: Mapping[str, Replied], columns) -> list[dict[str, Any]]:
    """The lines of replies.jsonl."""

    def score(name: str, key: str, row: int) -> float | None:
        value = columns[name][key][row] if key in columns[name] else np.nan
        return None if np.isnan(value) else float(value)

    def reply(name: str, row: int) -> dict[str, Any]:
        each = replied[name]
        return {
            "text": each.texts[row],
            "tokens": len(each.tokens[row]),
            "finished": bool(each.finished[row]),
        } | {key: score(name, key, row) for key in ("reward", "gold")}

    return [
        {
            "prompt_id": int(prompts.prompt_id[row]),
            "prompt": tokenizer.decode(prompts.row(row)[0].tolist(), skip_special_tokens=True),
            "replies": {name: reply(name, row) for name in replied},
        }
        for row in range(len(prompts))
    ]


STAGE = Stage(
    kind="evaluate",
    settings=Settings,
    produces=REPLIES,
    run=run,
    programs=programs,
    check=check,
    rows=lambda job, pairs, easy: job.settings.count * len(job.settings.policies),
    shown=Shown(
        figures=("prompts", "policies.*.gold", "policies.*.reward", "policies.*.kl"),
        part="evaluations",
        make=sections.evaluation,
    ),
)
