"""Policies and held-out prompts enter; a reply of each to every prompt leaves, scored, compared, and told in a table.

replies.jsonl holds a line for each prompt, with every policy's reply and its scores: a judge, people and the report
read it. report.json holds the means, the comparisons, and reward against KL of every policy, along PPO's training too.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpo_jax import metrics, scoring, sharding
from mpo_jax.data import encode
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import sample_rows
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge, labellers, statistics
from mpo_jax.models.config import ModelConfig
from mpo_jax.stages import job as jobs
from mpo_jax.stages import reward, rollouts, split
from mpo_jax.stages.job import Artifact, Job

REPLIES, REPORT = "replies.jsonl", "report.json"
SAMPLED = "sampled"
"""The folder that keeps each policy's replies as soon as they are there: a stage that was killed samples the rest."""
_NGRAM, _DISTINCT = 4, 2
"""Lengths of the n-grams that repetition counts within a reply, and diversity over all of a policy's replies."""


@dataclasses.dataclass(frozen=True)
class Replied:
    """One policy's replies to every prompt. rows: prompts with one reply each. logps: f32 [prompts], summed, of the
    policy itself at the sampling temperature."""

    rows: Encoded
    tokens: list[np.ndarray]
    texts: list[str]
    finished: np.ndarray
    logps: np.ndarray


def run(job: Job) -> dict[str, Any]:
    """Samples, scores, compares; writes both files and prints the table."""
    settings = job.settings
    policies = policies_of(job)
    names = [artifact.name for artifact in policies]
    if settings.baseline and settings.baseline not in names:
        raise InputError(f"stages.{job.name}.baseline: {settings.baseline!r} is none of {', '.join(names)}")
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    base = jobs.base_weights(job, model)
    prompts = heldout_prompts(job, model, tokenizer)
    logps = logps_step(model, job.mesh, settings.temperature)
    truncation = rollouts.sampling_config(job, settings, 1).truncation
    replied, baseline = {}, None
    for artifact in policies:
        kept = _kept(job, artifact.name, prompts, tokenizer)
        if kept is None:
            weights = base | jobs.load_weights(job, artifact, model, jobs.frozen_dtype(job))
            kept = _reply(job, model, tokenizer, weights, prompts, logps)
            _keep(job, artifact.name, kept)
        replied[artifact.name] = kept
        if artifact.name == settings.baseline:
            baseline = artifact
    columns: dict[str, dict[str, np.ndarray]] = {name: _measured(each) for name, each in replied.items()}
    if baseline is not None:
        weights = base | jobs.load_weights(job, baseline, model, jobs.frozen_dtype(job))
        key = "log_ratio" if truncation else "kl"
        for name, each in replied.items():
            columns[name][key] = each.logps - _rowwise(job, logps, weights, each.rows)
    if "reward" in job.inputs:
        weights = base | jobs.load_weights(job, job.inputs["reward"], model, jobs.frozen_dtype(job))
        score = reward.scoring_step(model, 1, job.mesh)
        for name, each in replied.items():
            columns[name]["reward"] = _rowwise(job, score, weights, each.rows)
    if settings.labeller:
        for name, each in replied.items():
            columns[name]["gold"] = labellers.score(settings.labeller, each.texts)
    lines = _lines(prompts, tokenizer, replied, columns)
    report = {
        "prompts": len(prompts),
        "baseline": settings.baseline,
        "truncation": truncation,
        "policies": {
            name: {key: float(np.mean(values)) for key, values in columns[name].items()}
            | ({"kl_error": standard_error(columns[name]["kl"])} if "kl" in columns[name] else {})
            | {"distinct": distinct(replied[name].tokens, _DISTINCT)}
            for name in names
        },
        "comparisons": compared(lines, settings.baseline, settings.bootstrap, job.seed),
    }
    report["frontier"] = frontier(job, report["policies"])
    if jax.process_index() == 0:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (job.folder / REPLIES).write_text(text)
        print(table(report), flush=True)
    jobs.write_json(job.folder / REPORT, report)
    return {key: report[key] for key in ("prompts", "baseline", "policies")}


def policies_of(job: Job) -> list[Artifact]:
    """The policies that the stage names. InputError for none, or for one named twice."""
    found: Any = job.inputs.get("policies", [])
    names = [artifact.name for artifact in found]
    if not names or len(set(names)) < len(names):
        raise InputError(f"stages.{job.name}.policies: {names}; expected at least one policy, each once")
    return found


def heldout_prompts(job: Job, model: ModelConfig, tokenizer) -> Encoded:
    """A fair sample of `count` held-out prompts: of the split that the stage names, or else of the eval share."""
    if "prompts" in job.inputs:
        return split.heldout_prompts(job.inputs["prompts"], job.settings.count)
    found = jobs.share_prompts(job, model, tokenizer, "eval")
    return encode.take(found, sample_rows(len(found), job.settings.count))


def logps_step(model: ModelConfig, mesh, temperature: float):
    """Jitted `(weights, batch) -> f32 [B,1]`, on every device: the summed log-probs of one reply at a temperature (at
    1 where sampling is greedy)."""
    heat = temperature or 1.0
    return jax.jit(
        lambda weights, batch: scoring.response_logps(model, weights, batch, heat).seq_logps(1),
        out_shardings=sharding.replicated(mesh),
    )


def compared(lines: Sequence[judge.Row], baseline: str, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Comparisons by each score that every reply has, with Holm's correction over the pairs, as plain data."""
    names = list(lines[0]["replies"])
    if len(names) < 2:
        return []
    found = []
    for key, by in (("gold", "the gold labeller"), ("reward", "the reward model")):
        if lines[0]["replies"][names[0]][key] is None:
            continue
        family = []
        for left, right in judge.pairs_of(lines, (), baseline):
            replies = [(line["replies"][left], line["replies"][right]) for line in lines]
            won = statistics.outcomes([a[key] for a, _ in replies], [b[key] for _, b in replies])
            lengths = np.array([a["tokens"] - b["tokens"] for a, b in replies])
            family.append(statistics.compare(left, right, by, won, lengths, resamples, seed))
        found += [
            dataclasses.asdict(comparison) | {"sentence": statistics.sentence(comparison)}
            for comparison in statistics.holm(family)
        ]
    return found


def frontier(job: Job, policies: Mapping[str, Mapping[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Reward-model score against KL to the baseline: of each policy, and along training of the PPO stages that logged
    both. {} where the evaluation has no baseline or no reward model. A policy's own point is its last, without a step.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for artifact in policies_of(job):
        means = policies[artifact.name]
        if "kl" not in means or "reward" not in means:
            return {}
        along = _along_training(job, artifact) if artifact.kind == "ppo" else []
        found[artifact.name] = [*along, {"kl": means["kl"], "score": means["reward"]}]
    return found


def _along_training(job: Job, artifact: Artifact) -> list[dict[str, float]]:
    """The held-out evaluations of a ppo stage whose KL is to the baseline and whose score is this reward model's."""
    settings = job.config.stages[artifact.name]
    baseline = job.settings.baseline
    key = {settings.sft: "eval/kl_sft", settings.reference: "eval/kl"}.get(baseline, "")
    if (settings.labeller, settings.reward) != ("reward", job.settings.reward):
        return []
    rows = metrics.read(artifact.folder)
    return [{"step": row["step"], "kl": row[key], "score": row["eval/score"]} for row in rows if key in row]


def standard_error(values: np.ndarray) -> float:
    """Of a mean over prompts."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def table(report: Mapping[str, Any]) -> str:
    """The policies' means in columns, and the comparisons' sentences."""
    keys = [key for key in ("gold", "reward", "kl", "log_ratio", "tokens", "finished", "repetition", "distinct")
            if all(key in means for means in report["policies"].values())]  # fmt: skip
    wins = {(c["left"], c["by"]): c for c in report["comparisons"] if c["right"] == report["baseline"]}
    kinds = list(dict.fromkeys(c["by"] for c in report["comparisons"])) if report["baseline"] else []
    named = {"kl": f"KL to {report['baseline']}", "log_ratio": f"log-ratio to {report['baseline']}"}
    heads = [named.get(key, key) for key in keys]
    heads += [f"wins by {by.removeprefix('the ')}" for by in kinds]
    rows = []
    for name, means in report["policies"].items():
        cells = [f"{means[key]:.3f}" + (f" ± {means['kl_error']:.3f}" if key == "kl" else "") for key in keys]
        for by in kinds:
            c = wins.get((name, by))
            cells.append("" if c is None else f"{c['win_rate']:.3f} [{c['low']:.3f}, {c['high']:.3f}]")
        rows.append([name, *cells])
    rows = [["policy", *heads], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    told = []
    if "log_ratio" in keys:
        told = [f"no KL: replies were drawn with {report['truncation']}; the log-ratio's mean over them is none"]
    return "\n".join([*lines, *told, *(c["sentence"] for c in report["comparisons"])])


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


def _reply(job: Job, model: ModelConfig, tokenizer, weights, prompts: Encoded, logps) -> Replied:
    settings = job.settings
    how = rollouts.sampling_config(job, settings, 1)
    found = rollouts.sample_all(job, model, weights, prompts, how, settings.batch_size, job.seed)
    rows = split.with_replies(prompts, found.tokens)
    return Replied(
        rows,
        [each[0] for each in found.tokens],
        [each[0] for each in found.texts(tokenizer)],
        found.finished[:, 0],
        _rowwise(job, logps, weights, rows),
    )


def _keep(job: Job, name: str, replied: Replied) -> None:
    """Writes a policy's replies, whole or not at all."""
    if jax.process_index() != 0:
        return
    folder = job.folder / SAMPLED
    folder.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    lens = np.array([len(ids) for ids in replied.tokens], np.int64)
    np.savez(held, tokens=np.concatenate(replied.tokens), lens=lens, finished=replied.finished, logps=replied.logps)
    partial = folder / f"{name}.partial"
    partial.write_bytes(held.getvalue())
    partial.rename(folder / f"{name}.npz")


def _kept(job: Job, name: str, prompts: Encoded, tokenizer) -> Replied | None:
    """The replies that an earlier run of this very stage kept; a folder belongs to one set of inputs and settings."""
    file = job.folder / SAMPLED / f"{name}.npz"
    if not file.exists():
        return None
    with file.open("rb") as opened, np.load(opened) as arrays:
        tokens = np.split(arrays["tokens"], np.cumsum(arrays["lens"])[:-1])
        finished, logps = arrays["finished"], arrays["logps"]
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in tokens]
    rows = split.with_replies(prompts, [[ids] for ids in tokens])
    return Replied(rows, tokens, texts, finished, logps)


def _rowwise(job: Job, step, weights, rows: Encoded) -> np.ndarray:
    """`step` over all rows, f32 [rows]."""
    batch_size = job.settings.score_batch or job.settings.batch_size
    loader = jobs.loader(job, rows, batch_size, shuffle=False, max_length=None)
    return reward.collect(step, weights, loader, 1)[:, 0]


def _measured(replied: Replied) -> dict[str, np.ndarray]:
    """What needs no other model, a number for each reply."""
    return {
        "tokens": np.array([len(ids) for ids in replied.tokens]),
        "finished": replied.finished.astype(np.float64),
        "repetition": np.array([repetition(ids) for ids in replied.tokens]),
    }


def _lines(prompts: Encoded, tokenizer, replied: Mapping[str, Replied], columns) -> list[dict[str, Any]]:
    """The lines of replies.jsonl."""

    def reply(name: str, row: int) -> dict[str, Any]:
        scores = {key: float(columns[name][key][row]) if key in columns[name] else None for key in ("reward", "gold")}
        each = replied[name]
        return {
            "text": each.texts[row],
            "tokens": len(each.tokens[row]),
            "finished": bool(each.finished[row]),
        } | scores

    return [
        {
            "prompt_id": int(prompts.prompt_id[row]),
            "prompt": tokenizer.decode(prompts.row(row)[0].tolist(), skip_special_tokens=True),
            "replies": {name: reply(name, row) for name in replied},
        }
        for row in range(len(prompts))
    ]
