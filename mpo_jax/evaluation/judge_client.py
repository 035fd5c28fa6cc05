"""Questions enter; answers of an endpoint that speaks OpenAI's chat-completions protocol leave, paid or from a cache.

`posting` bounds each call in time and size; when to wait and to try again, `asking` decides, so that every attempt
counts towards the ceiling. What the endpoint says is kept and shown without the API key, should it repeat that.
"""

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import annotated_types
import pydantic

from mpo_jax import posting, progress
from mpo_jax import settings as declared
from mpo_jax.asking import Again, Asker
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge_cache
from mpo_jax.evaluation.judge_cache import Cache
from mpo_jax.settings import Amount, Count, Positive, Section, Whole, setting

LARGEST = 1 << 22
"""Bytes of an answer, at most."""
_MOST_TOKENS = 10_000_000
"""Of a call. No endpoint's figure above it is believed."""


class Endpoint(Section):
    """Whom to ask, and how hard. Ceilings are checked before each call: those in flight are finished."""

    base_url: str = setting(
        "https://api.openai.com/v1", "the address of a server with the chat-completions protocol", min_length=1
    )
    model: str = setting("", "the server's name for the model")
    key_variable: str = setting(
        "OPENAI_API_KEY", "environment variable with the API key; empty: the server needs none", operational=True
    )
    temperature: Amount = setting(0.0, "sampling temperature of the judge's answers")
    answer_tokens: Count = setting(256, "largest length of an answer", unit="tokens")
    limit_key: str = setting(
        "max_tokens",
        "the name under which answer_tokens is sent; some models want max_completion_tokens",
        min_length=1,
    )
    concurrency: Annotated[int, annotated_types.Interval(ge=1, le=1024)] = setting(
        8, "number of calls at a time", operational=True
    )
    seconds: Positive = setting(120.0, "longest time of a call", unit="seconds", operational=True)
    attempts: Count = setting(6, "number of attempts at a question before the stage stops", operational=True)
    max_calls: Whole = setting(
        0, "largest number of the stage's calls, including failed attempts; 0: no limit", unit="calls", operational=True
    )
    max_tokens: Whole = setting(
        0,
        "largest number of the stage's tokens, of questions and answers; 0: no limit",
        unit="tokens",
        operational=True,
    )
    backoff: Positive = setting(
        1.0,
        "pause before the second attempt at a question; each further one is twice as long",
        unit="seconds",
        operational=True,
    )

    @pydantic.model_validator(mode="after")
    def _address(self):
        if told := posting.wrong_address(self.base_url):
            raise declared.wrong("base_url", told)
        return self

    def check(self) -> None:
        """InputError for what can't be asked."""
        if not self.model:
            raise InputError("model: empty; expected the name under which the endpoint serves it")

    def request(self, text: str) -> dict[str, Any]:
        """The body of a question."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            self.limit_key: self.answer_tokens,
            "messages": [{"role": "user", "content": text}],
        }

    def cache_key(self, text: str) -> str:
        return judge_cache.key({"base_url": self.base_url, **self.request(text)})


def ask(endpoint: Endpoint, texts: list[str], cache: Cache, run: str) -> list[str]:
    """An answer to each question, in order; each distinct question is paid for once, ever.

    run: under which name the cache counts what is spent. InputError for a missing key, an endpoint that refuses the
    request or stays silent, and a ceiling that is reached; what was answered until then is kept.
    """
    endpoint.check()
    texts = [posting.readable(text) for text in texts]
    keys = {text: endpoint.cache_key(text) for text in texts}
    open_texts = [text for text, key in keys.items() if cache.get(key) is None]
    if open_texts:
        with ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge") as threads:
            asyncio.run(_Asker(endpoint, cache, run, keys, threads).all(open_texts))
    return [str(cache.get(keys[text])) for text in texts]


class _Asker:
    """What one run asks an endpoint, and what it may spend on it."""

    def __init__(
        self, endpoint: Endpoint, cache: Cache, run: str, keys: Mapping[str, str], threads: ThreadPoolExecutor
    ):
        self._endpoint, self._cache, self._run, self._keys, self._threads = endpoint, cache, run, keys, threads
        self._place = posting.Place(
            f"judge at {endpoint.base_url}",
            f"{endpoint.base_url.rstrip('/')}/chat/completions",
            _key(endpoint),
            endpoint.seconds,
            LARGEST,
            self._hint,
        )

    async def all(self, texts: list[str]) -> None:
        endpoint = self._endpoint
        with progress.work("judge", len(texts)) as here:
            asker = Asker(
                self._place.who,
                self._one,
                concurrency=endpoint.concurrency,
                attempts=endpoint.attempts,
                backoff=endpoint.backoff,
                done=here.add,
            )
            await asker.all(texts)

    async def _one(self, text: str) -> None:
        """One attempt at a question; its answer is kept."""
        self._check_ceiling()
        self._cache.charge_call(self._run)
        body = await posting.post(self._place, json.dumps(self._endpoint.request(text)).encode(), self._threads)
        said, usage = _read(body)
        answer = posting.hidden(posting.readable(said), self._place.secret)
        tokens = _tokens(usage, text, said, self._endpoint.answer_tokens)
        self._cache.put(self._run, self._keys[text], self._endpoint.model, answer, *tokens)

    def _check_ceiling(self) -> None:
        calls, tokens = self._cache.spent(self._run)
        for name, spent in (("max_calls", calls), ("max_tokens", tokens)):
            ceiling = getattr(self._endpoint, name)
            if ceiling and spent >= ceiling:
                raise InputError(
                    f"judge {name}: the ceiling of {ceiling:,} is reached ({calls:,} calls, {tokens:,} tokens); "
                    "answers so far are kept, raise it and run the same command again"
                )

    def _hint(self, status: int, said: bytes) -> str:
        """What to do about a refusal, or what the endpoint says of it."""
        if status in (401, 403):
            return "; check the API key in the variable that key_variable names"
        if status == 404:
            return "; check base_url and model"
        try:
            told = json.loads(said)["error"]["message"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return ""
        told = posting.hidden(" ".join(told.split()), self._place.secret) if isinstance(told, str) else ""
        return f": {posting.readable(told)[:300]}" if told else ""


def _key(endpoint: Endpoint) -> str:
    """The API key, "" where the server wants none."""
    key = posting.secret(endpoint.key_variable)
    if endpoint.key_variable and not key:
        raise InputError(f"key_variable: the environment variable {endpoint.key_variable} is not set")
    return key


def _read(body: bytes) -> tuple[str, Any]:
    """The answer's text, and what the endpoint says that it cost; `Again` for what is not a whole reply. A reply
    without text is one."""
    try:
        reply = json.loads(body)
        text = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text, usage = 0, None
    if not isinstance(text, str | None):
        raise Again("an answer that does not follow the protocol, or is cut off")
    return text or "", usage


def _tokens(usage: Any, question: str, answer: str, limit: int) -> tuple[int, int]:
    """Tokens of the question and of the answer, as the endpoint counts them. Where its figure is none, or none that
    could be, the most that there can be: one for each byte, and for the answer, whose thoughts may be unseen, `limit`
    at least. So no figure makes the ceiling give way."""

    def figure(name: str, most: int) -> int:
        given = usage.get(name) if isinstance(usage, dict) else None
        known = isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= _MOST_TOKENS
        return int(given) if given is not None and known else most

    return (
        figure("prompt_tokens", len(question.encode())),
        figure("completion_tokens", max(limit, len(answer.encode("utf-8", "replace")))),
    )
