"""An evaluate stage's replies enter; a judge's verdicts on them leave: their table, and each one.

The judge: an endpoint that speaks the chat-completions protocol, one of the run's own policies, or scores that the
evaluation has computed. All go through the same table.
"""

import functools
from typing import Any, Literal

import jax
import numpy as np
import pydantic

from mpo_jax import artifacts
from mpo_jax import settings as declared
from mpo_jax.artifacts import POLICY, REPLIES, VERDICTS
from mpo_jax.data import encode
from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge, judge_client, judge_prompts, sections
from mpo_jax.evaluation.judge_cache import Cache
from mpo_jax.evaluation.judge_client import Endpoint
from mpo_jax.evaluation.judge_prompts import Question
from mpo_jax.evaluation.sections import Shown
from mpo_jax.run import StageSettings
from mpo_jax.settings import Count, Names, role, setting
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages import rows
from mpo_jax.stages.base import Stage
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Programs

_VERDICT_TOKENS = 8  # " A" and its EOS, in any tokenizer


class Settings(StageSettings, Endpoint):
    """A judge's verdicts on the replies of an evaluation."""

    evaluate: str = role(REPLIES, "evaluate", "the evaluation whose replies are judged")
    judge: Literal["endpoint", "local", "reward", "gold"] = setting(
        "endpoint", "who judges: a server, a policy of the run (`local`), or the scores in the evaluation"
    )
    local: str = role(POLICY, "", "the policy that judges, if judge=local")
    policies: Names = setting((), "the policies of the evaluation that are judged; empty: all")
    baseline: str = setting("", "the policy that the others are compared with; empty: every two are compared")
    rubric: Literal["summary", "helpful", "harmless"] = setting(
        "helpful", "which of the package's questions the judge answers"
    )
    prompt_file: str = setting(
        "", "a Jinja file with a question of your own, with {{ prompt }}, {{ first }} and {{ second }}; empty: `rubric`"
    )
    bootstrap: Count = setting(2000, "number of bootstrap resamples for an interval")
    batch_size: Count = setting(8, "questions that a local policy reads at a time", unit="rows")

    @pydantic.model_validator(mode="after")
    def _judge(self):
        if self.judge == "local" and not self.local:
            raise declared.wrong("local", "empty; expected the policy that judges")
        return self


def check(job: Job[Settings]) -> None:
    """InputError for a judge that can't be asked; nobody is asked."""
    settings = job.settings
    evaluation = job.config.stages[job.inputs["evaluate"].name]
    known = getattr(evaluation, "rows", ())  # a plugin's kind may have none
    for name, role_ in [(each, "policies") for each in settings.policies] + [(settings.baseline, "baseline")]:
        if name and known and name not in known:
            raise job.error(role_, f"{name!r} is none of the evaluation's policies {', '.join(known)}")
    for judge_, needed in (("gold", "labeller"), ("reward", "reward")):
        if settings.judge == judge_ and not getattr(evaluation, needed, judge_):
            raise job.error("judge", f"{judge_!r}, but stages.{job.inputs['evaluate'].name}.{needed} is empty")
    if settings.judge == "local":
        jobs.check_batch(job, settings.batch_size)
    if settings.judge in ("endpoint", "local"):
        try:
            judge_prompts.load(settings.prompt_file or settings.rubric)
        except InputError as error:
            raise job.error("prompt_file", str(error)) from None
    if settings.judge == "endpoint":
        try:
            settings.check()
        except InputError as error:
            raise InputError(f"stages.{job.name}.{error}") from None
        if jax.process_count() > 1:
            raise job.error("judge", "an endpoint is asked by one process; run this stage on one host")


def programs(job: Job[Settings]) -> Programs:
    """Log-probs of both verdicts, where a policy judges."""
    if job.settings.judge != "local":
        return {}
    model = jobs.model(job)
    weights = jobs.abstract_base(job, model) | shapes.frozen_weights(job, model)
    batch = shapes.batch(job, job.settings.batch_size, model.max_positions, 2 * _VERDICT_TOKENS)
    return {"logps": rows.logps_program(job, model, weights, batch, 2)}


def run(job: Job[Settings]) -> dict[str, Any]:
    """Asks what has not been answered before, writes the table, returns the summary."""
    settings = job.settings
    replies = judge.read_replies(job.inputs["evaluate"].folder / artifacts.REPLIES_FILE)
    pairs = judge.pairs_of(replies, settings.policies, settings.baseline)
    how = {"resamples": settings.bootstrap, "seed": job.seed}
    if settings.judge in ("reward", "gold"):
        by = {"reward": "the reward model", "gold": "the gold labeller"}[settings.judge]
        lines = judge.score_lines(replies, pairs, settings.judge)
        make = functools.partial(judge.by_scores, replies, pairs, by, settings.judge)
        more: dict[str, Any] = {}
    else:
        prompt = settings.prompt_file or settings.rubric
        questions = judge_prompts.questions(replies, pairs, judge_prompts.load(prompt))
        by, answers, spent = (_ask_policy if settings.judge == "local" else _ask_endpoint)(job, questions)
        lines = judge.verdict_lines(questions, answers)
        make = functools.partial(judge.by_answers, replies, pairs, by, questions, answers)
        name = "a file" if settings.prompt_file else settings.rubric
        more = spent | {"prompt": name, "prompt_version": judge_prompts.version(prompt)}
    if jobs.is_first():  # before the table: an unreadable judge is to be looked at
        artifacts.write_lines(job.folder / artifacts.VERDICTS_FILE, lines)
    table = make(**how) | more
    if jobs.is_first():
        artifacts.write_json(job.folder / artifacts.JUDGE_TABLE, table)
    jobs.say("\n".join(pair["sentence"] for pair in table["pairs"]))
    return table


def content(settings: Settings) -> dict[str, str]:
    """The version of a prompt that comes with the package: another text is another judge. A file's text counts by
    itself."""
    asked = settings.judge in ("endpoint", "local") and not settings.prompt_file
    return {"rubric": judge_prompts.version(settings.rubric)} if asked else {}


def _ask_endpoint(job: Job[Settings], questions: list[Question]) -> tuple[str, list[str | None], dict[str, Any]]:
    """Asked once, by process 0 alone; the cache lies in the workdir, so that other stages share it."""
    settings = job.settings
    with Cache(job.workdir / artifacts.JUDGE_CACHE) as cache:
        answers: list[str | None] = [*judge_client.ask(settings, [q.text for q in questions], cache, job.folder.name)]
        calls, tokens = cache.spent(job.folder.name)
    return settings.model, answers, {"calls": calls, "tokens": tokens}


def _ask_policy(job: Job[Settings], questions: list[Question]) -> tuple[str, list[str | None], dict[str, Any]]:
    """The verdict to which a policy gives the higher log-probability; None for what is beyond its context."""
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
        of = jobs.making(job.inputs["local"])
        logps = rows.compute(job, programs(job)["logps"], weights, encoded, job.settings.batch_size, of)
        for index, (first, second) in zip(encoded.id.tolist(), logps, strict=True):
            answers[index] = f"Verdict: {'A' if first > second else 'B' if second > first else 'tie'}"
    return job.inputs["local"].name, answers, {"too_long": int(np.sum([answer is None for answer in answers]))}


STAGE = Stage(
    kind="judge",
    settings=Settings,
    produces=VERDICTS,
    run=run,
    programs=programs,
    check=check,
    content=content,
    rows=lambda job, pairs, easy: 2.0 * job.config.stages[job.settings.evaluate].count,
    shown=Shown(part="judge", make=sections.verdicts),
)
