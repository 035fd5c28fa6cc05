"""An address enters; the scores that a server gives to prompts and replies leave, asked in batches, several at a time.

The protocol: POST {"prompts": [text, ...], "replies": [text, ...]} as JSON, answered by {"scores": [number or null,
...]} in the same order. docs/scorers.md says it in full.
"""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpo_jax.asking import RETRIED, Again, Asker, retry_after
from mpo_jax.errors import InputError
from mpo_jax.scorers.limits import Limits

LARGEST = 1 << 24
"""Bytes of an answer, at most."""
_BLOCK = 1 << 16

Batch = tuple[Sequence[str], Sequence[str]]
"""Prompts and replies."""


class Server:
    """Whom to ask, and how hard. The bearer token, if there is one, comes from the environment."""

    def __init__(self, address: str, limits: Limits):
        self._address, self._limits = address, limits
        self._url = urllib.parse.urlsplit(address)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        token = os.environ.get(limits.token_variable, "") if limits.token_variable else ""
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def score(self, batches: Sequence[Batch], kept: Callable[[int, list[float | None]], None]) -> None:
        """Asks for the scores of every batch; kept(number, scores) is called for each as it comes.

        InputError for a server that refuses, stays silent or can't be reached, after as many attempts as there may be.
        """
        limits = self._limits
        with ThreadPoolExecutor(limits.concurrency, thread_name_prefix="scorer") as threads:

            async def attempt(number: int) -> None:
                kept(number, await self._ask(batches[number], threads))

            asker = Asker(
                repr(self._address),
                attempt,
                concurrency=limits.concurrency,
                attempts=limits.attempts,
                backoff=limits.backoff,
            )
            asyncio.run(asker.all(range(len(batches))))

    async def _ask(self, batch: Batch, threads: ThreadPoolExecutor) -> list[float | None]:
        body = json.dumps({"prompts": list(batch[0]), "replies": list(batch[1])}).encode()
        secure = self._url.scheme == "https"
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._url.hostname is not None, "names are checked where settings are read"
        connection = make(self._url.hostname, self._url.port, timeout=self._limits.seconds)
        call = asyncio.get_running_loop().run_in_executor(threads, self._post, connection, body)
        try:
            answer = await asyncio.wait_for(asyncio.shield(call), self._limits.seconds)
        except TimeoutError as error:
            _hang_up(connection)
            with contextlib.suppress(Again, InputError):
                await call
            raise Again(f"nothing within {self._limits.seconds:g} s") from error
        finally:
            connection.close()
        return _read(answer)

    def _post(self, connection: http.client.HTTPConnection, body: bytes) -> bytes:
        """The body of the answer. Redirects are not followed: they would hand the token to somebody else."""
        try:
            connection.request("POST", self._url.path or "/", body, self._headers)
            response = connection.getresponse()
            read = bytearray()
            until = time.monotonic() + self._limits.seconds
            while (block := response.read1(_BLOCK)) and len(read) <= LARGEST and time.monotonic() < until:
                read += block
        except TimeoutError as error:
            raise Again(f"nothing within {self._limits.seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Again(f"no connection ({type(error).__name__})") from error
        code = response.status
        if code in RETRIED or code >= 500:
            raise Again(f"status {code}", retry_after(repr(self._address), dict(response.headers.items())))
        if code != 200:
            hint = f"; check the token in {self._limits.token_variable}" if code in (401, 403) else ""
            raise InputError(f"{self._address!r}: refused with status {code}{hint}")
        if len(read) > LARGEST:
            raise InputError(f"{self._address!r}: its answer is above {LARGEST:,} bytes")
        return bytes(read)


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Ends whatever a thread waits for on it."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _read(body: bytes) -> list[float | None]:
    """The scores; `Again` for what is not a whole answer: a proxy's page, or one that was cut off."""
    try:
        scores = json.loads(body)["scores"]
    except (ValueError, LookupError, TypeError) as error:
        raise Again('an answer that is not {"scores": [...]}, or cut off') from error
    if not isinstance(scores, list):
        raise Again('an answer whose "scores" are no list')
    return scores
