"""Items and a store enter; the web page on which people judge them leaves, as a Starlette application.

What a browser is told: the prompt and two replies, never which policy wrote which. What it may ask is checked three
times: the Host (a page elsewhere can't reach a server on loopback by a name of its own), the token where one is set,
and, for what writes, the Origin and a JSON body.
"""

import hmac
import importlib.resources
import json
import urllib.parse
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation
from mpo_jax.evaluation.annotation import Item, Store

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "annotate_token"
_LARGEST_BODY = 64 * 1024
_ASSETS = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create(items: Sequence[Item], store: Store, seed: int, question: str, token: str = "") -> ASGIApp:
    """The application. seed: decides which reply stands first. question: what annotators are asked. token: what every
    request must bring, as a cookie that the address with ?token=TOKEN leaves; "": none, and only loopback is served.
    """
    page = _Page(items, store, seed, question)
    routes = [
        *(Route(path, _asset(*asset)) for path, asset in _ASSETS.items()),
        Route("/api/task", page.task),
        Route("/api/judgement", page.judgement, methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes, exception_handlers={InputError: _refused}), token)


class _Page:
    def __init__(self, items: Sequence[Item], store: Store, seed: int, question: str):
        self._items, self._store, self._seed, self._question = items, store, seed, question

    async def task(self, request: Request) -> Response:
        """What to judge: the item of a number (to look at again), or the annotator's next."""
        annotator = annotation.checked_name(request.query_params.get("annotator"))
        judged = self._store.judged(annotator)
        wanted = request.query_params.get("number")
        if wanted is None:
            number = next((n for n, item in enumerate(self._items) if item.key not in judged), None)
        else:
            number = self._number(int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 else None)
        found: dict[str, Any] = {
            "question": self._question,
            "total": len(self._items),
            "done": sum(item.key in judged for item in self._items),
            "number": number,
        }
        if number is not None:
            item = self._items[number]
            first = annotation.left_first(item, annotator, self._seed)
            replies = item.texts if first else item.texts[::-1]
            found |= {"prompt": item.prompt, "replies": replies, "choice": None, "comment": ""}
            before = self._store.get(annotator, item.key)
            if before is not None:
                side = "first" if before.choice == before.first else "second"
                found |= {"choice": "tie" if before.choice == "tie" else side, "comment": before.comment}
        return JSONResponse(found)

    async def judgement(self, request: Request) -> Response:
        body = await _json(request)
        annotator = annotation.checked_name(body.get("annotator"))
        item = self._items[self._number(body.get("number"))]
        self._store.put(
            annotation.judge(
                item, annotator, self._seed, body.get("choice"), body.get("comment", ""), body.get("seconds", 0)
            )
        )
        return JSONResponse({"kept": True})

    def _number(self, number: Any) -> int:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self._items):
            raise InputError(f"number: expected one from 0 to {len(self._items) - 1}")
        return number


def _asset(name: str, kind: str):
    """An endpoint that sends one file of the package: no path of a request ever reaches a file system."""
    content = importlib.resources.files("mpo_jax.evaluation").joinpath("page", name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


class _Guard:
    """Lets a request through to the application, or refuses it; gives every answer the security headers."""

    def __init__(self, application: ASGIApp, token: str):
        self._application, self._token = application, token

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)  # start and stop; there are no sockets
            return

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        request = Request(scope)
        answer = self._refusal(request) or self._application
        await answer(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request that may not pass."""
        host = request.headers.get("host", "")
        if not self._token and _name(host) not in LOOPBACK:
            return _error(403, "this page is served to this machine alone")
        if self._token and not self._brings_token(request):
            given = request.query_params.get("token", "")
            if request.method == "GET" and request.url.path == "/" and self._same(given):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
                return answer
            return _error(401, "a token is needed: open the address that the annotate command printed")
        if request.method not in ("GET", "HEAD"):
            origin = urllib.parse.urlsplit(request.headers.get("origin", ""))
            if origin.netloc != host or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return _error(403, "a page elsewhere may not write here")
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return _error(415, "expected a JSON body")
        return None

    def _brings_token(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return self._same(request.cookies.get(COOKIE, "")) or (scheme == "Bearer" and self._same(given))

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _name(host: str) -> str:
    """The host without its port: "[::1]:8008" is "::1"."""
    return urllib.parse.urlsplit(f"//{host}").hostname or ""


async def _json(request: Request) -> dict[str, Any]:
    """The body, an object. InputError for one that is too large or not JSON."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY:
            raise InputError(f"expected a body of at most {_LARGEST_BODY:,} bytes")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("the body is not JSON") from error
    if not isinstance(found, dict):
        raise InputError("expected a JSON object")
    return found


def _error(code: int, words: str) -> Response:
    return JSONResponse({"error": words}, code)


async def _refused(request: Request, error: Exception) -> Response:
    return _error(400, str(error))
