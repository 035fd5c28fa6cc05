"""Items and a store enter; the web page on which people judge them leaves, as a Starlette application.

What a browser is told: the prompt and two replies, never which policy wrote which. What it may ask is checked three
times: the Host (a page elsewhere can't reach a server on loopback by a name of its own), the token where one is set,
and, for what writes, the Origin and a JSON body.

The token's cookie is SameSite=Lax: a link in a mail is a navigation from elsewhere, behind which a browser keeps back a
Strict cookie, also from the page that the link redirects to. Lax gives it to such navigations alone, which read; what
writes is a POST, to which no page elsewhere can add it, and whose Origin is checked besides.
"""

import hmac
import importlib.resources
import json
import re
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mpo_jax.errors import InputError
from mpo_jax.evaluation import annotation
from mpo_jax.evaluation.annotation import Item, Store
from mpo_jax.posting import readable

COOKIE = "annotate_token"
_LARGEST_BODY = 64 * 1024
_HISTORY = 200
"""Judgements that an annotator can step back through."""
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
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
        Route("/api/withdrawal", page.withdrawal, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {InputError: _refused, ClientDisconnect: _gone, Exception: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), token)


class _Page:
    def __init__(self, items: Sequence[Item], store: Store, seed: int, question: str):
        self._items, self._store, self._seed, self._question = items, store, seed, readable(question)
        self._numbers = {item.key: number for number, item in enumerate(items)}

    async def task(self, request: Request) -> Response:
        """What to judge: the item of a number (to look at again), or the annotator's next."""
        annotator = annotation.checked_name(request.query_params.get("annotator"))
        judged = [self._numbers[key] for key in self._store.judged(annotator) if key in self._numbers]
        wanted = request.query_params.get("number")
        if wanted is None:
            known = set(judged)
            number = next((n for n in range(len(self._items)) if n not in known), None)
        else:
            number = self._number(int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 else None)
        found: dict[str, Any] = {
            "question": self._question,
            "total": len(self._items),
            "done": len(judged),
            "before": judged[-_HISTORY:],
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

    async def withdrawal(self, request: Request) -> Response:
        """Takes a judgement back; an item that the annotator has not judged stays so."""
        body = await _json(request)
        annotator = annotation.checked_name(body.get("annotator"))
        item = self._items[self._number(body.get("number"))]
        if self._store.get(annotator, item.key) is not None:
            self._store.put(annotation.withdrawn(item, annotator))
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
        found = _HOST.fullmatch(host)
        if found is None:
            return _error(400, "the Host header names no host")
        if not self._token and found[1].strip("[]").lower() not in annotation.LOOPBACK:
            return _error(403, "this page is served to this machine alone")
        if self._token and not self._brings_token(request):
            given = request.query_params.get("token", "")
            if request.method == "GET" and request.url.path == "/" and self._same(given):
                answer = RedirectResponse("/", 303)
                secure = request.url.scheme == "https"  # as a proxy on this machine says by X-Forwarded-Proto
                answer.set_cookie(COOKIE, self._token, httponly=True, samesite="lax", secure=secure)
                return answer
            return _error(401, "a token is needed: open the address that the annotate command printed")
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin", "").lower()
            own = (f"http://{host.lower()}", f"https://{host.lower()}")
            if origin not in own or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return _error(403, "a page elsewhere may not write here")
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return _error(415, "expected a JSON body")
        return None

    def _brings_token(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return self._same(request.cookies.get(COOKIE, "")) or (scheme == "Bearer" and self._same(given))

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


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


async def _gone(request: Request, error: Exception) -> Response:
    """Whoever asked has hung up, or was too slow: nobody reads this."""
    return _error(400, "the request ended early")


async def _failed(request: Request, error: Exception) -> Response:
    """The server's own log has the error; the page tells its annotator that nothing was kept."""
    return _error(500, "the server could not do it; its log says why")
