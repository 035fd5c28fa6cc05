"""Prompts and replies as text enter; the scores of a scorer outside the device leave, equal on every process.

Process 0 asks. What a function or a server has scored is kept in the workdir, and never asked again.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from mpo_jax import processes, progress, stopping
from mpo_jax.errors import InputError
from mpo_jax.scorers import cache, names
from mpo_jax.scorers.cache import Cache
from mpo_jax.scorers.http import Server
from mpo_jax.scorers.limits import Limits
from mpo_jax.scorers.python import Function

_TOLD = 4096
"""Replies whose scores process 0 tells the others at a time: none of them waits for all."""

Records = Sequence[Mapping[str, Any]]


class Score(Protocol):
    """What asks a scorer outside the device."""

    def __call__(self, prompts: Sequence[str], replies: Sequence[str], records: Records) -> np.ndarray:
        """f32 [replies]: a score for each, NaN where there is none."""
        ...


@contextlib.contextmanager
def opened(name: str, limits: Limits, kept: epath.PathLike | None) -> Iterator[Score]:
    """A scorer to be asked, until the context ends. kept: the file of scores given before; None: none is kept.

    InputError, naming the scorer, for what it can't do; also while it is asked.
    """
    with contextlib.ExitStack() as stack:
        ask = _asked(name, limits, kept, stack) if jax.process_index() == 0 else None

        def score(prompts: Sequence[str], replies: Sequence[str], records: Records) -> np.ndarray:
            found = []
            for start in range(0, len(replies), _TOLD):
                part = slice(start, start + _TOLD)
                size = len(replies[part])

                def work(part: slice = part) -> np.ndarray:
                    assert ask is not None
                    return np.array(ask(prompts[part], replies[part], records[part]), np.float32)

                found.append(processes.from_first(work, (size,), f"scores of {name}"))
            return np.concatenate(found) if found else np.zeros(0, np.float32)

        yield score


def _asked(name: str, limits: Limits, kept: epath.PathLike | None, stack: contextlib.ExitStack):
    """`(prompts, replies, records) -> scores`, None where there is none."""
    if name in names.SCORERS:
        function = names.SCORERS[name]
        return lambda prompts, replies, records: checked(name, function(prompts, replies), replies)
    memory = None if kept is None else stack.enter_context(Cache(kept))
    if name.startswith(names.PYTHON):
        worker = stack.enter_context(Function(name, limits.seconds))

        def all_of(batches, keep) -> None:
            for number, batch in enumerate(batches):
                stopping.obey_here()
                keep(number, worker.score(*batch))
    else:
        server = Server(name, limits)

        def all_of(batches, keep) -> None:
            server.score([batch[:2] for batch in batches], keep)

    identity = names.identity(name)
    return lambda prompts, replies, records: _remembered(
        name, identity, limits.batch, memory, all_of, prompts, replies, records
    )


def _remembered(name: str, identity: str, size: int, memory: Cache | None, all_of, prompts, replies, records):
    """The scores, asked for in batches where they are not known; each batch is kept as soon as it is there."""
    asked = zip(prompts, replies, records, strict=True)
    keys = [cache.key(identity, prompt, reply, record.get("columns")) for prompt, reply, record in asked]
    known = {} if memory is None else memory.get(list(dict.fromkeys(keys)))
    first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
    places = sorted(first.values())
    parts = [places[start : start + size] for start in range(0, len(places), size)]
    batches = [tuple([column[place] for place in part] for column in (prompts, replies, records)) for part in parts]

    def keep(here: progress.Work, number: int, scores: list[float | None]) -> None:
        found = [(keys[place], score) for place, score in
                 zip(parts[number], checked(name, scores, batches[number][1]), strict=True)]  # fmt: skip
        known.update(found)
        if memory is not None:
            memory.put(found)
        here.add(len(found))

    with progress.work(f"scores of {name}", len(places)) as here:
        all_of(batches, functools.partial(keep, here))
    return [known[key] for key in keys]


def checked(name: str, scores: Any, replies: Sequence[str]) -> list[float | None]:
    """The scores, if there is one for each reply: a finite number, or None. InputError, naming the scorer, if not."""
    scores = list(scores)
    if len(scores) != len(replies):
        raise InputError(f"{name!r}: gave {len(scores)} scores to {len(replies)} replies; expected one each")
    for place, score in enumerate(scores):
        if score is None:
            continue
        if not _finite(score):
            reply = " ".join(replies[place].split())
            raise InputError(
                f"{name!r}: gave {_shown(score)} to reply {place} of {len(replies)}, {reply[:60]!r}; expected a finite "
                "number, or None for no score"
            )
    return [None if score is None else float(score) for score in scores]


def _shown(score: Any) -> str:
    """What was given, in few characters: 10**4000 has too many."""
    try:
        told = " ".join(repr(score).split())
    except ValueError:  # an integer of more digits than Python prints
        told = "a huge number"
    return told if len(told) <= 60 else f"{told[:57]}..."


def _finite(score: Any) -> bool:
    """Whether it is a number, and finite as float32."""
    if isinstance(score, bool | str | bytes) or np.ndim(score) != 0 or not np.isreal(score):
        return False
    try:
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(score)))
    except (TypeError, ValueError, OverflowError):  # a dict, a date, 10**400
        return False
