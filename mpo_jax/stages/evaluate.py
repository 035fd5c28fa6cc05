"""Policies and held-out prompts enter; a reply of each to every prompt leaves, scored, compared, and told in a table.

One file holds a line for each prompt, with every policy's reply and its scores: a judge, people and the report read
it. Another holds the means, the comparisons, and reward against KL of every policy, along a training too.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from mpo_jax import artifacts, metrics
from mpo_jax import settings as declared
from mpo_jax.artifacts import DATA, PAIRS, POLICY, REPLIES, REWARD
from mpo_jax.data import encode
from mpo_jax.data.division import REPORT
from mpo_jax.data.encode import Encoded
from mpo_jax.data.plan import sample_rows
from mpo_jax.evaluation import judge, sections, statistics, table, verdict
from mpo_jax.evaluation.judge import AT
from mpo_jax.evaluation.sections import Shown
from mpo_jax.models.config import ModelConfig
from mpo_jax.run import sources_of
from mpo_jax.scorers.names import OWN, Scorer, Scorers
from mpo_jax.settings import Count, Names, Whole, role, setting
from mpo_jax.stages import buckets, candidates, corpus, curves, decodings, rows, scores, shards
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.base import Sampling, Stage, Training
from mpo_jax.stages.curves import Curves
from mpo_jax.stages.decodings import Decodings
from mpo_jax.stages.job import Artifact, Job
from mpo_jax.stages.programs import Call, Program, Programs
from mpo_jax.types import PyTree

_NGRAM, _DISTINCT = 4, 2
"""Lengths of the n-grams that repetition counts within a reply, and diversity over all of a policy's replies."""


class Settings(Sampling, Decodings, Curves):
    """Policies compared by their replies to held-out prompts."""

    policies: Names = role(POLICY, ("sft", "dpo", "mpo"), "the policies that reply and are compared")
    reward: str = role(REWARD, "reward", "the reward model that scores the replies; empty: none does", optional=True)
    baseline: str = setting("sft", "the policy that the others are compared with; empty: every two are compared")
    prompts: str = role(
        PAIRS,
        "split/all",
        "the split whose held-out prompts are used; data, or empty: the held-out prompts of the data",
        optional=True,
        data=True,
    )
    heldout: Literal["report", "whole"] = setting(
        "report",
        "which held-out prompts are used: the half that no training reads, or both halves (whole), if no stage of "
        "another kind reads the data",
        later=True,
    )
    count: Count = setting(128, "number of held-out prompts", unit="prompts")
    labeller: Annotated[Scorer, Scorers(more=("",))] = setting(
        "", "a scorer whose scores are shown, as gold scores, beside the reward model's; empty: none"
    )
    bootstrap: Count = setting(2000, "number of bootstrap resamples for an interval")
    batch_size: Count = setting(32, "prompts for which replies are sampled at a time", unit="rows")
    score_batch: Whole = setting(0, "rows scored at a time; 0: batch_size", unit="rows", operational=True)

    @pydantic.model_validator(mode="after")
    def _policies(self):
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise declared.wrong("policies", f"{list(self.policies)}; expected at least one policy, each once")
        if self.baseline and self.baseline not in self.policies:
            raise declared.wrong("baseline", f"{self.baseline!r} is none of {', '.join(self.policies)}")
        decodings.check_names(self)
        if self.heldout == "whole" and self.prompts not in ("", DATA):
            raise declared.wrong("heldout", f"'whole', beside prompts of {self.prompts!r}; expected prompts='data'")
        return self

    @property
    def rows(self) -> list[str]:
        """The policies of the table, by the names that they have there."""
        return [entry.name for entry in decodings.entries(self)]

    @property
    def scored_rows(self) -> int:
        return self.score_batch or self.batch_size


def check(job: Job[Settings]) -> None:
    """InputError for sampling that the model or the mesh can't do; nothing is loaded."""
    jobs.check_batch(job, job.settings.batch_size)
    jobs.check_batch(job, job.settings.scored_rows, "score_batch")
    for entry in decodings.entries(job.settings):
        decodings.how(job, entry)
    curves.check(job)
    scores.check(job)
    read = [name for name in sources_of(job.settings) if name in corpus.others_read(job)]
    if job.settings.heldout == "whole" and read:
        which = ", ".join(repr(name) if name else "the run's data" for name in read)
        raise job.error("heldout", f"'whole', but other stages read {which} too; expected a source of its own in data")


@shapes.made_once
def programs(job: Job[Settings]) -> Programs:
    """The sampler, log-probs of its replies, and the scorers."""
    model = jobs.model(job)
    settings = job.settings
    base = jobs.abstract_base(job, model)
    weights = base | shapes.frozen_weights(job, model)
    scorer = base | shapes.frozen_weights(job, model, head=True) if settings.reward else None
    compiled = decodings.programs(job, model, weights, scorer)
    drawn = {1: decodings.of_replies(job, 1)}
    if scorer is not None:
        compiled["score"] = rows.scoring_program(job, model, scorer, drawn[1], 1)
    elif settings.best_of:
        drawn[settings.best_of] = decodings.of_replies(job, settings.best_of)
    return compiled | scores.programs(job, "labeller", drawn)


def calls(job: Job[Settings]) -> Iterator[Call]:
    """See `base.Stage.calls`: the samplers'. How long the replies will be that are scored then, nobody knows."""
    settings, model = job.settings, jobs.model(job)
    prompts, compiled = heldout_prompts(job, model, jobs.load_tokenizer(job, model)), programs(job)
    for entry in {entry.suffix: entry for entry in decodings.entries(settings)}.values():
        sampler = compiled[f"sample{entry.suffix}"]
        yield from candidates.calls(job, sampler, prompts, decodings.how(job, entry), settings.batch_size)


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
    entries = decodings.entries(settings)
    kept, part = curves.snapshots(job), curves.prompts(job, len(prompts))
    fewer = encode.take(prompts, part)
    measured = [*entries, *(snapshot for each in kept.values() for _, snapshot in each)]
    how = {entry.name: decodings.how(job, entry) for entry in measured}
    replied, several, passed = {}, {}, {}
    for artifact in policies:
        weights, of = _loaded(job, model, base, artifact), jobs.making(artifact)
        for entry in (entry for entry in entries if entry.policy == artifact.name):
            if entry.n > 1:
                several[entry.name] = decodings.several(job, compiled, weights, prompts, entry, of)
            else:
                replied[entry.name] = _reply(job, compiled, tokenizer, weights, prompts, entry, of)
        for step, snapshot in kept.get(artifact.name, ()):
            weights = _loaded(job, model, base, artifact, f"{artifacts.SNAPSHOTS}/{step}")
            passed[snapshot.name] = _reply(job, compiled, tokenizer, weights, fewer, snapshot, [*of, f"step {step}"])
    if several:
        replied |= _best(job, model, compiled, tokenizer, base, prompts, several)
    replied = {entry.name: replied[entry.name] for entry in entries}
    drawn = replied | passed
    columns: dict[str, dict[str, np.ndarray]] = {name: _measured(each) for name, each in drawn.items()}
    for baseline in (artifact for artifact in policies if artifact.name == settings.baseline):
        weights, of = _loaded(job, model, base, baseline), jobs.making(baseline)
        for entry in measured:
            each, truncated = drawn[entry.name], how[entry.name].truncation
            at = f"logps{AT}{entry.decoding}" if entry.decoding else "logps"
            heat = str(how[entry.name].temperature)
            ratio = each.logps - _rowwise(job, compiled[at], weights, each.rows, [*of, heat])
            # Of a best of n these are the ratios of the policy that drew them, not its own.
            columns[entry.name]["log_ratio" if truncated else "kl" if entry.n == 1 else "kl_bound"] = ratio
    if "score" in compiled:
        weights, of = _loaded(job, model, base, job.inputs["reward"]), jobs.making(job.inputs["reward"])
        for name, each in drawn.items():
            columns[name]["reward"] = _rowwise(job, compiled["score"], weights, each.rows, of)
    if settings.labeller:
        with scores.opened(job, "labeller", tokenizer, compiled, settings.scored_rows) as score:
            for name, each in drawn.items():
                columns[name]["gold"] = score(each.rows)[:, 0]
    lines = _lines(prompts, tokenizer, replied, columns)
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "baseline": settings.baseline,
        "truncation": how[entries[0].name].truncation,
        "policies": {
            entry.name: _means(columns[entry.name], entry.n)
            | {"distinct": distinct(replied[entry.name].tokens, _DISTINCT)}
            for entry in entries
        },
        "comparisons": compared(lines, settings.baseline, settings.bootstrap, job.seed),
    }
    if settings.decodings:
        report["decodings"] = {entry.decoding: how[entry.name].truncation for entry in entries if entry.decoding}
    report["errors"] = {
        name: {key: statistics.standard_error(values[~np.isnan(values)]) for key, values in columns[name].items()}
        for name in replied
    }
    report["frontier"] = frontier(job, report["policies"])
    trained = [name for name in settings.policies if isinstance(job.config.stages.get(name), Training)]
    beneath = {each.name: artifacts.beneath(each.folder) for each in policies}
    subject = verdict.subject(trained or settings.policies, beneath)  # a blend rests on more, but ends no training
    plain = {entry.name: report["policies"][entry.name] for entry in entries if not entry.decoding}
    report["verdict"] = verdict.given(lines, subject, plain, settings.baseline)
    if (along := curves.section(job, columns, kept, part, subject)) is not None:
        report["curves"] = along
        report["verdict"] = verdict.at_equal_kl(report["verdict"], along)
    if jobs.is_first():
        artifacts.write_lines(job.folder / artifacts.REPLIES_FILE, lines)
        artifacts.write_json(job.folder / artifacts.REPORT, report)
    jobs.say(table.text(report))
    return {key: report[key] for key in ("prompts", "baseline", "policies")}


def heldout_prompts(job: Job, model: ModelConfig, tokenizer) -> Encoded:
    """A fair sample of `count` held-out prompts that no training has seen, nor chosen a checkpoint by: of the split
    that the stage names, or else of the data."""
    if "prompts" in job.inputs:
        return buckets.heldout_prompts(job.inputs["prompts"], REPORT, job.settings.count)
    if job.settings.heldout == "whole":
        prompts = corpus.heldout_prompts(job, model, tokenizer)
    else:
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
    both. {} where the evaluation has no baseline or no reward model. A policy's own point is its last, without a step;
    a best of n stands at the bound of its KL. Other decodings have no point: their KL is another temperature's."""
    points: dict[str, list[dict[str, float]]] = {}
    for artifact in job.inputs["policies"]:
        means = policies[artifact.name]
        if "kl" not in means or "reward" not in means:
            return {}
        along = _along_training(job, artifact)
        points[artifact.name] = [*along, {"kl": means["kl"], "score": means["reward"]}]
    best = {name: means for name, means in policies.items() if "kl_bound" in means}
    return points | {name: [{"kl": means["kl_bound"], "score": means["reward"]}] for name, means in best.items()}


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


def _means(columns: Mapping[str, np.ndarray], n: int = 1) -> dict[str, float]:
    """Of what there is in each column; how many replies have no gold score, where some have none; and the KL's standard
    error, or its bound of the best of n: the policy's own distance on those replies, and theirs to the policy."""
    known = {key: values[~np.isnan(values)] for key, values in columns.items()}
    missing = len(columns["gold"]) - len(known["gold"]) if "gold" in columns else 0
    means = {key: float(np.mean(values)) for key, values in known.items() if len(values)}
    if "kl" in means:
        means["kl_error"] = statistics.standard_error(columns["kl"])
    if "kl_bound" in means:
        means["kl_bound"] += decodings.kl_bound(n)
    return means | ({"gold_unscored": missing} if missing else {})


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


def _loaded(
    job: Job, model: ModelConfig, base: PyTree, artifact: Artifact, name: str = artifacts.WEIGHTS
) -> Callable[[], PyTree]:
    """Gives a policy's weights, loaded when they are first asked for: a stage that was killed has done without. name:
    see `jobs.load_weights`."""
    return shards.loaded(lambda: base | jobs.load_weights(job, artifact, model, jobs.frozen_dtype(job), name))


def _reply(
    job: Job[Settings], compiled: Programs, tokenizer, weights: Callable[[], PyTree], prompts: Encoded,
    entry: decodings.Entry, of: Sequence[str],
) -> Replied:  # fmt: skip
    """One reply of a policy to each prompt. of: what its weights are."""
    how, sampler = decodings.how(job, entry), compiled[f"sample{entry.suffix}"]
    drawn = candidates.sample_all(job, sampler, weights, prompts, how, job.settings.batch_size, of)
    tokens = [each[0] for each in drawn.tokens]
    read = candidates.with_replies(prompts, drawn.tokens)
    logps = _rowwise(job, compiled[f"logps{entry.suffix}"], weights, read, [*of, str(how.temperature)])
    return _replied(prompts, tokenizer, tokens, drawn.finished[:, 0], logps)


def _best(
    job: Job[Settings], model: ModelConfig, compiled: Programs, tokenizer, base, prompts: Encoded,
    several: Mapping[str, decodings.Several],
) -> dict[str, Replied]:  # fmt: skip
    """Of several replies to each prompt, the best by the reward model, or else by the labeller."""

    def chosen(drawn: decodings.Several, found: np.ndarray) -> Replied:
        which = decodings.best(found)
        tokens = [each[place] for each, place in zip(drawn.replies.tokens, which, strict=True)]
        finished, logps = (x[np.arange(len(which)), which] for x in (drawn.replies.finished, drawn.logps))
        return _replied(prompts, tokenizer, tokens, finished, logps)

    size = job.settings.scored_rows
    if "score_best" in compiled:
        weights, of = _loaded(job, model, base, job.inputs["reward"]), jobs.making(job.inputs["reward"])
        program = compiled["score_best"]
        return {
            name: chosen(each, rows.compute(job, program, weights, each.rows, size, of))
            for name, each in several.items()
        }
    with scores.opened(job, "labeller", tokenizer, compiled, size) as score:
        return {name: chosen(each, score(each.rows)) for name, each in several.items()}


def _replied(prompts: Encoded, tokenizer, tokens: list[np.ndarray], finished: np.ndarray, logps: np.ndarray) -> Replied:
    texts = [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in tokens]
    return Replied(candidates.with_replies(prompts, [[ids] for ids in tokens]), tokens, texts, finished, logps)


def _rowwise(
    job: Job[Settings], program: Program, weights: Callable[[], PyTree], encoded: Encoded, of: Sequence[str]
) -> np.ndarray:
    """The program's number of every row, f32 [rows]. of: what the weights, and the numbers, are."""
    return rows.compute(job, program, weights, encoded, job.settings.scored_rows, of)[:, 0]


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


def rows_read(job: Job[Settings], pairs: int, easy: float) -> float:
    """See `base.Stage.rows`."""
    settings = job.settings
    whole = settings.count * sum(entry.n for entry in decodings.entries(settings))
    return whole + curves.planned(job) * min(settings.curve_prompts or settings.count, settings.count)


STAGE = Stage(
    kind="evaluate",
    settings=Settings,
    produces=REPLIES,
    run=run,
    programs=programs,
    check=check,
    rows=rows_read,
    calls=calls,
    shown=Shown(
        figures=("prompts", "policies.*.gold", "policies.*.reward", "policies.*.kl"),
        part="evaluations",
        make=sections.evaluation,
    ),
)
