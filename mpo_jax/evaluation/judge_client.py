"""Questions enter; answers of an endpoint that speaks OpenAI's chat-completions protocol leave, paid or from a cache.

The `openai` package (extra "judge") does the protocol; when to wait and to try again, `asking` decides, so that every
attempt counts towards the ceiling.
"""

import asyncio
import json
import os
import urllib.parse
from collections.abc import Mapping
from typing import Annotated, Any

import annotated_types

from mpo_jax import progress
from mpo_jax.asking import RETRIED, Again, Asker, retry_after
from mpo_jax.errors import InputError
from mpo_jax.evaluation import judge_cache
from mpo_jax.evaluation.judge_cache import Cache
from mpo_jax.settings import Amount, Count, Positive, Section, Whole, setting


class Endpoint(Section):
    """Whom to ask, and how hard. Ceilings are checked before each call: those in flight are finished."""

    base_url: str = setting("https://api.openai.com/v1", "where the chat-completions protocol is spoken", min_length=1)
    model: str = setting("", "the endpoint's name for the model")
    key_variable: str = setting(
        "OPENAI_API_KEY", "environment variable with the API key; empty: the server wants none", operational=True
    )
    temperature: Amount = setting(0.0, "of the judge's answers")
    answer_tokens: Count = setting(256, "of an answer, at most", unit="tokens")
    limit_key: str = setting(
        "max_tokens", "under which answer_tokens is sent; some models want max_completion_tokens", min_length=1
    )
    concurrency: Annotated[int, annotated_types.Interval(ge=1, le=1024)] = setting(
        8, "calls at a time", operational=True
    )
    seconds: Positive = setting(120.0, "that a call may take", unit="seconds", operational=True)
    attempts: Count = setting(6, "at a question, before the stage stops", operational=True)
    max_calls: Whole = setting(
        0, "ceiling of the stage, failed attempts included; 0: none", unit="calls", operational=True
    )
    max_tokens: Whole = setting(
        0, "ceiling of the stage, of questions and answers; 0: none", unit="tokens", operational=True
    )
    backoff: Positive = setting(
        1.0, "before the second attempt at a question, doubled from there", unit="seconds", operational=True
    )

    def check(self) -> None:
        """InputError for what can't be asked."""
        address = urllib.parse.urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"base_url: {self.base_url!r}; expected an address such as https://HOST/v1")
        if address.username or address.password or address.query:
            raise InputError("base_url: it holds credentials or a query, which would be written into the run")
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
    keys = {text: endpoint.cache_key(text) for text in texts}
    open_texts = [text for text, key in keys.items() if cache.get(key) is None]
    if open_texts:
        asyncio.run(_Asker(endpoint, cache, run, keys).all(open_texts))
    return [str(cache.get(keys[text])) for text in texts]


class _Asker:
    """What one run asks an endpoint, and what it may spend on it."""

    def __init__(self, endpoint: Endpoint, cache: Cache, run: str, keys: Mapping[str, str]):
        self._endpoint, self._cache, self._run, self._keys = endpoint, cache, run, keys
        self._client = _client(endpoint)

    async def all(self, texts: list[str]) -> None:
        endpoint = self._endpoint
        with progress.work("judge", len(texts)) as here:
            asker = Asker(
                f"judge at {endpoint.base_url}",
                self._one,
                concurrency=endpoint.concurrency,
                attempts=endpoint.attempts,
                backoff=endpoint.backoff,
                done=here.add,
            )
            async with self._client:
                await asker.all(texts)

    async def _one(self, text: str) -> None:
        """One attempt at a question; its answer is kept."""
        self._check_ceiling()
        self._cache.charge_call(self._run)
        answer, prompt_tokens, answer_tokens = await self._call(text)
        self._cache.put(self._run, self._keys[text], self._endpoint.model, answer, prompt_tokens, answer_tokens)

    def _check_ceiling(self) -> None:
        calls, tokens = self._cache.spent(self._run)
        for name, spent in (("max_calls", calls), ("max_tokens", tokens)):
            ceiling = getattr(self._endpoint, name)
            if ceiling and spent >= ceiling:
                raise InputError(
                    f"judge {name}: the ceiling of {ceiling:,} is reached ({calls:,} calls, {tokens:,} tokens); "
                    "answers so far are kept, raise it and run the same command again"
                )

    async def _call(self, text: str) -> tuple[str, int, int]:
        """The answer, the question's tokens, the answer's."""
        import openai

        try:
            raw = await self._client.chat.completions.with_raw_response.create(**self._endpoint.request(text))
        except openai.APITimeoutError as error:
            raise Again(f"nothing within {self._endpoint.seconds:g} s") from error
        except openai.APIStatusError as error:
            code = error.status_code
            if code in RETRIED or code >= 500:
                raise Again(f"status {code}", retry_after("judge", error.response.headers)) from error
            raise InputError(f"judge at {self._endpoint.base_url}: refused with status {code}{_hint(error)}") from error
        except openai.APIConnectionError as error:
            raise Again(f"no connection ({type(error.__cause__ or error).__name__})") from error
        return _read(raw.content)


def _client(endpoint: Endpoint):
    try:
        import openai
    except ImportError as error:
        raise InputError('judge: the openai package is not installed; pip install "mpo_jax[judge]"') from error
    key = os.environ.get(endpoint.key_variable, "") if endpoint.key_variable else "none"
    if not key:
        raise InputError(f"key_variable: the environment variable {endpoint.key_variable} is not set")
    return openai.AsyncOpenAI(api_key=key, base_url=endpoint.base_url, timeout=endpoint.seconds, max_retries=0)


def _read(body: bytes) -> tuple[str, int, int]:
    """The answer's text and both token counts; `Again` for what is not a whole reply. A reply without text is one."""
    try:
        reply = json.loads(body)
        text = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage") or {}
        return str(text or ""), int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Again("a reply that is not one of the protocol, or cut off") from error


def _hint(error: Any) -> str:
    """What to do about a refusal; what the server says of it, unless it may repeat the key."""
    if error.status_code in (401, 403):
        return "; check the API key in the variable that key_variable names"
    if error.status_code == 404:
        return "; check base_url and model"
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return f": {' '.join(said.split())[:300]}" if isinstance(said, str) else ""
