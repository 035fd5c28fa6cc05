"""Encoded rows, and a setting that says who scores, enter; a score of every reply leaves, whoever gives it.

One interface for every stage: `score(encoded, given) -> f32 [rows,N]`, equal on every process. On the device: the
run's own reward model, whose scores the stage brings, and models of others. On the host: functions and servers.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from mpo_jax import artifacts
from mpo_jax.data.encode import Encoded
from mpo_jax.data.records import Chat, TextRecord
from mpo_jax.errors import InputError
from mpo_jax.models import hf as hf_folders
from mpo_jax.scorers import hf, host, names
from mpo_jax.scorers.python import Function
from mpo_jax.settings import Section
from mpo_jax.stages import corpus, rows
from mpo_jax.stages import job as jobs
from mpo_jax.stages import programs as shapes
from mpo_jax.stages.job import Job
from mpo_jax.stages.programs import Program, Programs
from mpo_jax.types import Batch, PyTree

Brought = Mapping[str, Callable[[], np.ndarray]]
"""A scorer's name -> what gives f32 [rows,N], the scores that a stage brings: those of the run's own reward model."""


class Score(Protocol):
    """What an open scorer is asked by."""

    def __call__(self, encoded: Encoded, given: Brought | None = None) -> np.ndarray:
        """f32 [rows,N]: the scores of rows with N replies each, NaN where there is none. given: gives those of the
        scorers that the stage asks itself; it is called when all others have been asked."""
        ...


def uses_own(value: names.Scorer) -> bool:
    """Whether a setting names the run's own reward model."""
    return names.OWN in names.terms(value)


def check(job: Job) -> None:
    """InputError, by the setting, for a scorer that can't be asked; models are not loaded, servers not called, and
    functions imported in a process of their own, by process 0."""
    for key, value in names.settings_of(job.settings).items():
        for name in names.terms(value):
            try:
                if name.startswith(names.HF):
                    jobs.computed(job, hf.find(name).architecture)
                elif name.startswith(names.PYTHON) and jax.process_index() == 0:
                    names.source(name)
                    Function(name, job.config.scorers.seconds).close()
            except InputError as error:
                raise job.error(key, str(error)) from None


def of_tokens(job: Job, key: str) -> dict[str, hf.Model]:
    """The models of others that a setting names and that read the run's own tokens, by their scorers' names: they can
    score a rollout where it lies. None in a plan, which knows no tokenizer of the run."""
    found = {name: hf.find(name) for name, _ in models(job.settings, key)}
    if not found or job.preset is not None or job.planned:
        return {}
    own = jobs.load_tokenizer(job, jobs.model(job))
    return {name: model for name, model in found.items() if hf.same_tokens(own, model.tokenizer)}


def programs(job: Job, key: str, batches: Mapping[int, Batch], brought: Collection[str] = ()) -> Programs:
    """The scorers on the device that a setting names beside the run's own and what is brought, for rows of so many
    replies each. Rows are as long as the policy's tokens make them: how long another tokenizer's are, the texts
    decide."""
    made: Programs = {}
    for name, label in models(job.settings, key):
        if name in brought:
            continue
        model = jobs.computed(job, hf.find(name).architecture)
        weights = abstract_weights(job, name)
        for replies, batch in batches.items():
            made[f"{label}_of_{replies}"] = rows.scoring_program(job, model, weights, batch, replies)
    return made


def abstract_weights(job: Job, name: str) -> PyTree:
    """Shapes and shardings of a model's weights, by its scorer's name."""
    return shapes.frozen_weights(job, jobs.computed(job, hf.find(name).architecture), head=True)


def load_weights(job: Job, found: hf.Model) -> PyTree:
    """A model's weights on the run's mesh."""
    model = jobs.computed(job, found.architecture)
    return jobs.without_output(hf_folders.import_weights(found.folder, model, job.mesh, jobs.frozen_dtype(job)))


def held(job: Job, *keys: str) -> list[PyTree]:
    """Shapes of all the weights that the scorers of some settings hold on the device, beside the run's own."""
    named = {name for key in keys for name, _ in models(job.settings, key)}
    return [abstract_weights(job, name) for name in sorted(named)]


@contextlib.contextmanager
def opened(
    job: Job,
    key: str,
    tokenizer: Any,
    compiled: Programs,
    batch_size: int,
    steady: bool = False,
    brought: Collection[str] = (names.OWN,),
) -> Iterator[Score]:
    """The scorers that a setting names, to be asked until the context ends.

    compiled: the stage's programs. steady: they are asked for a batch at a time, whose texts should have one length.
    brought: names whose scores the stage brings. InputError, by the setting, for whatever a scorer can't do."""
    terms = names.terms(getattr(job.settings, key))
    data = _Data(job, tokenizer)
    with contextlib.ExitStack() as stack:
        try:
            ask: dict[str, Callable[[Encoded], np.ndarray]] = {}
            for name, label in models(job.settings, key):
                if name not in brought:
                    ask[name] = _model(job, name, label, data, compiled, batch_size, steady)
            for name in terms:
                if name not in ask and name not in brought:
                    scorer = stack.enter_context(host.opened(name, job.config.scorers, kept(job)))
                    ask[name] = functools.partial(_on_host, scorer, data, name.startswith(names.PYTHON))
        except InputError as error:
            raise job.error(key, str(error)) from None

        def score(encoded: Encoded, given: Brought | None = None) -> np.ndarray:
            try:
                found = {name: asked(encoded) for name, asked in ask.items()}
            except InputError as error:
                raise job.error(key, str(error)) from None
            return weighted(terms, found | {name: give() for name, give in (given or {}).items()})

        yield score


def weighted(terms: Mapping[str, float], scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum of scores by weights, f32 [rows,N]; NaN where any of them has none."""
    if list(terms.values()) == [1.0]:
        return np.asarray(scores[next(iter(terms))], np.float32)
    total = np.sum([weight * np.asarray(scores[name], np.float64) for name, weight in terms.items()], axis=0)
    return total.astype(np.float32)


def kept(job: Job) -> epath.Path:
    """The file of scores given before."""
    return job.workdir / artifacts.SCORES


@dataclasses.dataclass(frozen=True)
class _Data:
    """What the run's data says of prompts, read when it is first asked for."""

    job: Job
    tokenizer: Any

    @functools.cached_property
    def said(self) -> dict[int, TextRecord]:
        return corpus.said(self.job, self.tokenizer)

    @functools.cached_property
    def chats(self) -> dict[int, Chat]:
        return {number: record.chat for number, record in self.said.items() if record.chat is not None}

    def record(self, number: int) -> dict[str, Any]:
        """What a function is told of a prompt beside its text; {} of one that the data no longer has."""
        record = self.said.get(number)
        if record is None:
            return {}
        known = {name: getattr(record, name) for name in ("id", "split", "prompt", "chosen", "rejected", "confidence",
                                                          "margin")}  # fmt: skip
        if record.chat is not None:
            known["messages"] = [turn.message() for turn in record.chat.turns]
        if record.kept:
            known["columns"] = json.loads(record.kept)
        return {name: value for name, value in known.items() if value is not None}


def models(settings: Section, key: str) -> list[tuple[str, str]]:
    """The models of others that a setting names, each with what the names of its programs begin with."""
    found = [name for name in names.terms(getattr(settings, key)) if name.startswith(names.HF)]
    return [(name, f"{key}_hf{'' if place == 0 else place + 1}") for place, name in enumerate(found)]


def _model(
    job: Job, name: str, label: str, data: _Data, compiled: Programs, batch_size: int, steady: bool
) -> Callable[[Encoded], np.ndarray]:
    """Scores by a model on the run's mesh, its weights loaded here."""
    found = hf.find(name)
    reader = hf.Reader(found, data.tokenizer, lambda: data.chats)
    weights = load_weights(job, found)
    longest = [job.config.data.multiple]
    identity = names.identity(name)

    def score(encoded: Encoded) -> np.ndarray:
        encoded = reader.rows(encoded)
        options: dict[str, Any] = {}
        if steady:  # each length is a program of its own, so that lengths double
            while longest[0] < encoded.piece_lens.sum(axis=1).max():
                longest[0] *= 2
            options = {"max_buckets": 1, "multiple": longest[0]}
        program: Program = compiled[f"{label}_of_{encoded.replies}"]
        # A batch at a time is a step's, which has a checkpoint to go on from.
        return rows.compute(job, program, weights, encoded, batch_size, None if steady else [identity], **options)

    return score


def _on_host(scorer: host.Score, data: _Data, told: bool, encoded: Encoded) -> np.ndarray:
    """Scores of a scorer that reads text. told: whether it is told more of a prompt than its text."""
    prompts, replies, records = [], [], []
    for row in range(len(encoded)):
        prompt, *answers = (data.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in encoded.row(row))
        prompts += [prompt] * len(answers)
        replies += answers
        records += [data.record(int(encoded.prompt_id[row])) if told else {}] * len(answers)
    return scorer(prompts, replies, records).reshape(len(encoded), encoded.replies)
