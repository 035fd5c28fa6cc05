"""A job enters; the records of the data that its stage reads leave, and their token rows, share by share.

Also the rows that stages leave each other, as files.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from mpo_jax import artifacts, processes, store
from mpo_jax.data import division, encode, mixture, reading, shares, sources
from mpo_jax.data import records as text_records
from mpo_jax.data.records import TextRecord
from mpo_jax.errors import InputError
from mpo_jax.models.config import ModelConfig
from mpo_jax.run import Data, sources_of
from mpo_jax.stages.base import Sampling
from mpo_jax.stages.job import Job, data_division, dressed, is_first, prompt_limit, say


def check_data(data: Data, names: Iterable[str]) -> None:
    """InputError for what is wrong with the files of the sources named: their splits, their forms, their columns."""
    for name in names:
        whole = data_division(data, name)
        with reading.of_source(name):
            for split in filter(None, (whole.split, whole.eval_split)):
                sources.check(whole.path, split, whole.limit, whole.reading)


def records(job: Job, share: str, loaded_tokenizer=None, source: str = "", labelled: bool = False) -> list[TextRecord]:
    """The text records of a source's share: "sft_reward", "policy", "select" or "report"; process 0 prints the account
    of what was read. A prompt that another source of the stage holds out is left out too. labelled: see `Reading`."""
    data = job.config.data
    whole = data_division(data, source)
    assert whole.reading is not None
    whole = dataclasses.replace(whole, reading=dataclasses.replace(whole.reading, labelled=labelled))
    with reading.of_source(source):
        read, account = shares.read_share(whole, share, loaded_tokenizer)
        learned = share not in (division.SELECT, division.REPORT)
        others = [name for name in sources_of(job.settings) if learned and name != source]
        kept = division.without(read, [each for name in others for each in _heldout(data, name, loaded_tokenizer)])
        if not kept:
            raise InputError(f"{account.source}: every prompt is held out by another source of stages.{job.name}.data")
        account = account.of_share(share, len(kept), account.overlap + len(read) - len(kept))
    say(account.text())
    job.accounts.append(account)
    return kept


def said(job: Job, loaded_tokenizer) -> dict[int, TextRecord]:
    """What the data says of every prompt, by the prompt's id: its first record, of the sources that the stage reads, or
    else of all that the run does. Ids are given within a share; one that two prompts have is left out."""
    named = sources_of(job.settings) or {name: 1.0 for each in job.config.stages.values() for name in sources_of(each)}
    found: dict[int, TextRecord] = {}
    twice: set[int] = set()
    for part in (part for name in named for part in _parts(job, loaded_tokenizer, name)):
        numbers = division.prompt_ids([record.prompt_key for record in part]).tolist()
        for number, record in zip(numbers, part, strict=True):
            if found.setdefault(number, record).prompt_key != record.prompt_key:
                twice.add(number)
    return {number: record for number, record in found.items() if number not in twice}


def share_rows(job: Job, model: ModelConfig, loaded_tokenizer, share: str, replies: int) -> encode.Encoded:
    """The rows of a share, of the data that the stage names; training draws those of several sources by weight."""
    return _of_sources(job, share, loaded_tokenizer, lambda rows, shown: encode_rows(job, model, rows, replies, shown))


def share_labelled(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """Rows of one reply each with its label (1: good, 0: bad), as unpaired objectives take them: replies that the data
    labels, and of pairs the chosen as a good one, the rejected as a bad one. InputError for replies without either."""

    def make(read: list[TextRecord], shown) -> encode.Encoded:
        return encode_rows(job, model, text_records.labelled(read), 1, shown)

    return _of_sources(job, share, loaded_tokenizer, make, labelled=True)


def share_pairs(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """The pairs of a share: from the stage that made them, if the job's inputs name one, or from the data."""
    if "pairs" in job.inputs:
        return read_rows(job.inputs["pairs"].folder / share)
    return share_rows(job, model, loaded_tokenizer, share, 2)


def share_prompts(job: Job, model: ModelConfig, loaded_tokenizer, share: str) -> encode.Encoded:
    """The prompts of a share, each once, with room left for a reply within the row."""
    return _of_sources(job, share, loaded_tokenizer, lambda rows, shown: _prompts(job, rows, shown))


def others_read(job: Job) -> list[str]:
    """The sources that stages of other kinds than the job's read, "" for the run's own data."""
    others = (stage for stage in job.config.stages.values() if stage.kind != job.settings.kind)
    return list(dict.fromkeys(name for stage in others for name in sources_of(stage)))


def heldout_prompts(job: Job, model: ModelConfig, loaded_tokenizer) -> encode.Encoded:
    """Both halves of what the job's sources hold out, which no other kind of stage reads; and none of the prompts that
    begin as one of another source does, in any share: those may have been learned from."""
    known = [record for name in others_read(job) for part in _parts(job, loaded_tokenizer, name) for record in part]

    def make(rows: list[TextRecord], shown) -> encode.Encoded:
        kept = division.without(rows, known)
        if len(kept) < len(rows):
            say(f"  {len(rows) - len(kept)} records left out: other stages read data that begins as they do")
        if not kept:
            raise job.error(
                "heldout", "'whole', but every record here begins like one in the data that other stages read"
            )
        return _prompts(job, kept, shown)

    return _of_sources(job, (division.SELECT, division.REPORT), loaded_tokenizer, make)


def _prompts(job: Job, rows: list[TextRecord], loaded_tokenizer) -> encode.Encoded:
    data = job.config.data
    limits = encode.Limits(data.max_length, data.max_response, max_prompt=prompt_limit(job), too_long=data.too_long)
    return _encode(job, division.unique_prompts(rows), loaded_tokenizer, 0, limits)


def encode_rows(job: Job, model: ModelConfig, rows: list[TextRecord], replies: int, loaded_tokenizer) -> encode.Encoded:
    """Records as token rows within the config's limits, cached in the workdir."""
    data = job.config.data
    limits = encode.Limits(
        data.max_length, data.max_response, max_prompt=data.max_prompt or None, too_long=data.too_long
    )
    return _encode(job, rows, loaded_tokenizer, replies, limits)


def read_rows(folder: epath.Path) -> encode.Encoded:
    """Encoded rows that a stage wrote."""
    return encode.read(folder)


def write_rows(encoded: encode.Encoded, folder: epath.Path) -> None:
    """Encoded rows, over what a killed run may have left; process 0 alone writes them."""
    if not is_first():
        return
    store.remove(folder)
    encode.write(encoded, folder)


def _of_sources(
    job: Job,
    share: str | tuple[str, ...],
    loaded_tokenizer,
    make: Callable[[list[TextRecord], Any], encode.Encoded],
    labelled: bool = False,
) -> encode.Encoded:
    """`make` of the records of each source that the stage names, and of the tokenizer with its template; all mixed, as
    training draws them or else as they are read once. share: or several, of which some may be empty. labelled: see
    `Reading`."""
    weights = sources_of(job.settings) or {"": 1.0}
    parts = []
    for name in weights:
        shown = dressed(job, loaded_tokenizer, name)
        parts.append(make(_of_shares(job, share, shown, name, labelled), shown))
    try:
        mixed = mixture.once if isinstance(job.settings, Sampling) else mixture.mix
        return parts[0] if len(parts) == 1 else mixed(parts, list(weights.values()))
    except InputError as error:
        raise job.error("data", str(error)) from None


def _of_shares(
    job: Job, share: str | tuple[str, ...], loaded_tokenizer, source: str, labelled: bool
) -> list[TextRecord]:
    """The records of a source's share; or of several, if any of them holds one."""
    found: list[TextRecord] = []
    told: list[InputError] = []
    each = (share,) if isinstance(share, str) else share
    for name in each:
        try:
            found += records(job, name, loaded_tokenizer, source, labelled)
        except InputError as error:
            told.append(error)
    if len(told) == len(each):
        raise told[0]
    return found


def _heldout(data: Data, source: str, loaded_tokenizer) -> list[TextRecord]:
    """The records that a source holds out by a split of their own; those of the eval share are everywhere the same."""
    whole = data_division(data, source)
    if not whole.eval_split:
        return []
    with reading.of_source(source):
        return sources.load(whole.path, whole.eval_split, loaded_tokenizer, whole.limit, whole.reading)[0]


def _parts(job: Job, loaded_tokenizer, source: str) -> list[list[TextRecord]]:
    """The first record of every prompt of a source, share by share."""
    data = data_division(job.config.data, source)
    shown = dressed(job, loaded_tokenizer, source)
    with reading.of_source(source):
        heldout, kept = [], sources.load(data.path, data.split, shown, data.limit, data.reading)[0]
        if data.eval_split:
            heldout = sources.load(data.path, data.eval_split, shown, data.limit, data.reading)[0]
    taken = {record.first_turn for record in heldout}
    parts: dict[str, list[TextRecord]] = {}
    for record in division.unique_prompts([*heldout, *kept]):
        parts.setdefault(shares.share_of(record, data, taken), []).append(record)
    return list(parts.values())


def _encode(job: Job, rows: list[TextRecord], loaded_tokenizer, replies: int, limits: encode.Limits) -> encode.Encoded:
    """The rows of records that were read last, whose account says what became of them. Process 0 makes and keeps them;
    the others wait, and read what it has kept: arrays that they map are never written again."""
    cache = job.workdir / artifacts.CACHE if job.config.data.cache else None
    make = functools.partial(encode.encode, rows, loaded_tokenizer, replies, limits, cache)
    found: list[encode.Encoded] = []
    if cache is not None:
        processes.first(lambda: found.append(make()), "rows encoded")
    encoded = found[0] if found else make()
    if job.accounts:
        job.accounts[-1] = job.accounts[-1].with_rows(encoded.counts)
        say(job.accounts[-1].text().split("\n")[-1])
    return encoded
