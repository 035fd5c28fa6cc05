"""Things to ask somebody on a network enter; each is asked until it is answered, several at a time, or an error leaves.

When to wait, to try again and to stop is decided here, for the judge's endpoint and for scorers.
"""

import asyncio
import email.utils
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

from mpo_jax import stopping
from mpo_jax.errors import InputError

RETRIED = (408, 409, 425, 429)
"""Statuses that may be others soon, beside those of 500 and more."""
_LOOK = 0.5
"""Seconds between two looks, while waiting, at whether the run is to stop."""
_LONGEST_WAIT = 600.0
"""Seconds. A server that asks for more has run out of quota, not of breath."""


class Again(Exception):
    """An attempt that may succeed later. wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Asker:
    """The state that one run's workers share: what is left to ask, the pause a server asked for, the first failure.

    who: begins every error. attempt: asks one thing once, and keeps the answer; it raises `Again`, or InputError for
    what ends all. attempts: at each thing. backoff: seconds before the second, doubled from there. done: called for
    each answer.
    """

    def __init__(
        self,
        who: str,
        attempt: Callable[[Any], Awaitable[None]],
        *,
        concurrency: int,
        attempts: int,
        backoff: float,
        done: Callable[[], Any] = lambda: None,
    ):
        self._who, self._attempt, self._done = who, attempt, done
        self._concurrency, self._attempts, self._backoff = concurrency, attempts, backoff
        self._paused_until = 0.0
        self._failure: InputError | None = None
        self._left = False  # whether something is left that was not asked, as the run is to stop

    async def all(self, things: Iterable[Any]) -> None:
        """Asks everything, `concurrency` at a time. InputError: the first that any of them raised; Stopped, where the
        run is told to stop; calls in flight are finished."""
        waiting = iter(things)
        await asyncio.gather(*(self._work(waiting) for _ in range(self._concurrency)))
        if self._failure is not None:
            raise self._failure
        if self._left:
            stopping.obey_here()

    async def _work(self, waiting: Iterator[Any]) -> None:
        for thing in waiting:
            if stopping.told():
                self._left = True
                return
            try:
                await self._one(thing)
            except InputError as error:
                self._failure = self._failure or error
            if self._failure is not None or self._left:
                return
            self._done()

    async def _one(self, thing: Any) -> None:
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                await _wait(self._backoff * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
            while (pause := self._paused_until - time.monotonic()) > 0 and not stopping.told():
                await _wait(pause)
            if self._failure is not None:
                return
            if stopping.told():
                self._left = True
                return
            try:
                return await self._attempt(thing)
            except Again as again:
                reason = str(again)
                if again.wait is not None:  # the server's word goes for every worker
                    self._paused_until = max(self._paused_until, time.monotonic() + again.wait)
        raise InputError(
            f"{self._who}: no answer in {self._attempts} attempts, the last: {reason}; answers so far are kept, run "
            "the same command again"
        )


async def _wait(seconds: float) -> None:
    """Sleeps, until the run is told to stop."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not stopping.told():
        await asyncio.sleep(min(left, _LOOK))


def retry_after(who: str, headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, from either form of Retry-After (RFC 9110, 10.2.3). InputError for a wait
    that is too long."""
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    if math.isnan(seconds):
        return None
    if seconds > _LONGEST_WAIT:
        raise InputError(f"{who}: the server asks to wait {seconds:,.0f} s; answers so far are kept, run again then")
    return max(seconds, 0.0)
