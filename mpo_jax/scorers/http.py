"""An address enters; the scores that a server gives to prompts and replies leave, asked in batches, several at a time.

The protocol: POST {"prompts": [text, ...], "replies": [text, ...]} as JSON, answered by {"scores": [number or null,
...]} in the same order. docs/scorers.md says it in full.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpo_jax import posting
from mpo_jax.asking import Again, Asker
from mpo_jax.errors import InputError
from mpo_jax.scorers.limits import Limits

LARGEST = 1 << 24
"""Bytes of an answer, at most."""

Batch = tuple[Sequence[str], Sequence[str]]
"""Prompts and replies."""


class Server:
    """Whom to ask, and how hard. The bearer token, if there is one, comes from the environment."""

    def __init__(self, address: str, limits: Limits):
        self._limits = limits
        self._place = posting.Place(
            repr(address), address, posting.secret(limits.token_variable), limits.seconds, LARGEST, self._hint
        )

    def score(self, batches: Sequence[Batch], kept: Callable[[int, list[float | None]], None]) -> None:
        """Asks for the scores of every batch; kept(number, scores) is called for each as it comes.

        InputError for a server that refuses, stays silent or can't be reached, after as many attempts as there may be.
        """
        limits = self._limits
        with ThreadPoolExecutor(limits.concurrency, thread_name_prefix="scorer") as threads:

            async def attempt(number: int) -> None:
                kept(number, await self._ask(batches[number], threads))

            asker = Asker(
                self._place.who,
                attempt,
                concurrency=limits.concurrency,
                attempts=limits.attempts,
                backoff=limits.backoff,
            )
            asyncio.run(asker.all(range(len(batches))))

    async def _ask(self, batch: Batch, threads: ThreadPoolExecutor) -> list[float | None]:
        body = json.dumps({"prompts": list(batch[0]), "replies": list(batch[1])}).encode()
        return _read(await posting.post(self._place, body, threads), repr(self._place.address))

    def _hint(self, status: int, said: bytes) -> str:
        return f"; check the token in {self._limits.token_variable}" if status in (401, 403) else ""


def _read(body: bytes, who: str) -> list[float | None]:
    """The scores; `Again` for what is not a whole answer: a proxy's page, or one that was cut off. InputError for what
    is no number, without repeating it: a server may say anything there, the token too."""
    try:
        scores = json.loads(body)["scores"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Again('an answer that is not {"scores": [...]}, or is cut off') from error
    if not isinstance(scores, list):
        raise Again('an answer whose "scores" are no list')
    for place, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            kind = {str: "a text", bool: "true or false", list: "a list"}.get(type(score), "an object")
            raise InputError(f"{who}: gave {kind} to reply {place} of {len(scores)}; expected a number or null")
    return scores
