"""An evaluate stage's replies enter; a judge's verdicts leave, in judge.json (the table) and verdicts.jsonl (each one).

The judge: an endpoint that speaks the chat-completions protocol, one of the run's own policies, or scores that the
evaluation has computed. All go through the same table.
"""

from typing import Any

import jax
import numpy as np

from mpo_jax.data import encode
from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge, judge_client, judge_prompts
from mpo_jax.evaluation.judge_cache import Cache
from mpo_jax.evaluation.judge_prompts import Question
from mpo_jax.stages import dpo
from mpo_jax.stages import job as jobs
from mpo_jax.stages.job import Job
from mpo_jax.stages.reward import collect

JUDGES = ("endpoint", "local", "reward", "gold")
VERDICTS, CACHE = "verdicts.jsonl", "judge.sqlite"
_VERDICT_TOKENS = 8  # " A" and its EOS, in any tokenizer


def run(job: Job) -> dict[str, Any]:
    """Asks what has not been answered before, writes the table, returns the summary."""
    settings = job.settings
    if settings.judge not in JUDGES:
        raise InputError(f"stages.{job.name}.judge: {settings.judge!r}; expected one of {', '.join(JUDGES)}")
    rows = judge.read_replies(job.inputs["evaluate"].folder / "replies.jsonl")
    pairs = judge.pairs_of(rows, tuple(settings.policies), settings.baseline)
    how = {"resamples": settings.bootstrap, "seed": job.seed}
    if settings.judge in ("reward", "gold"):
        by = {"reward": "the reward model", "gold": "the gold labeller"}[settings.judge]
        table = judge.by_scores(rows, pairs, by, settings.judge, **how)
    else:
        questions = judge_prompts.questions(rows, pairs, judge_prompts.load(settings.prompt_file or settings.rubric))
        by, answers, spent = (_ask_policy if settings.judge == "local" else _ask_endpoint)(job, questions)
        if jax.process_index() == 0:
            (job.folder / VERDICTS).write_text(judge.verdict_lines(questions, answers))
        table = judge.by_answers(rows, pairs, by, questions, answers, **how) | spent
    jobs.write_json(job.folder / judge.TABLE, table)
    if jax.process_index() == 0:
        print("\n".join(pair["sentence"] for pair in table["pairs"]), flush=True)
    return table


def _ask_endpoint(job: Job, questions: list[Question]) -> tuple[str, list[str | None], dict[str, Any]]:
    """Asked once, by process 0 alone; the cache lies in the workdir, so that other stages share it."""
    settings = job.settings
    endpoint = judge_client.Endpoint(
        base_url=settings.base_url,
        model=settings.model,
        key_variable=settings.key_variable,
        temperature=settings.temperature,
        answer_tokens=settings.answer_tokens,
        limit_key=settings.limit_key,
        concurrency=settings.concurrency,
        seconds=settings.seconds,
        attempts=settings.attempts,
        max_calls=settings.max_calls,
        max_tokens=settings.max_tokens,
    )
    if jax.process_count() > 1:
        raise InputError(f"stages.{job.name}.judge: an endpoint is asked by one process; run this stage on one host")
    with Cache(jobs.local(job.workdir) / CACHE) as cache:
        answers: list[str | None] = [*judge_client.ask(endpoint, [q.text for q in questions], cache, job.folder.name)]
        calls, tokens = cache.spent(job.folder.name)
    return settings.model, answers, {"calls": calls, "tokens": tokens}


def _ask_policy(job: Job, questions: list[Question]) -> tuple[str, list[str | None], dict[str, Any]]:
    """The verdict to which a policy gives the higher log-probability; None for what is beyond its context."""
    if "local" not in job.inputs:
        raise InputError(f"stages.{job.name}.local: empty; expected the policy that judges")
    model = jobs.model(job)
    tokenizer = jobs.load_tokenizer(job, model)
    records = [TextRecord(f"{q.text}\nVerdict:", " A", " B", index, job.name) for index, q in enumerate(questions)]
    limits = encode.Limits(model.max_positions, _VERDICT_TOKENS, too_long="drop")
    encoded = encode.encode(records, tokenizer, 2, limits)
    answers: list[str | None] = [None] * len(questions)
    if len(encoded):
        weights = jobs.base_weights(job, model) | jobs.load_weights(
            job, job.inputs["local"], model, jobs.frozen_dtype(job)
        )
        loader = jobs.loader(job, encoded, job.settings.batch_size, shuffle=False, max_length=None)
        logps = collect(dpo.make_reference(model, job.mesh), weights, loader, 2)
        for index, (first, second) in zip(encoded.id.tolist(), logps, strict=True):
            answers[index] = f"Verdict: {'A' if first > second else 'B' if second > first else 'tie'}"
    return job.inputs["local"].name, answers, {"too_long": int(np.sum([answer is None for answer in answers]))}
