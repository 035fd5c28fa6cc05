"""A scorer behind HTTP on loopback: prompts and replies enter, a number for each leaves, with faults as a test asks.

`with ScorerServer(score, faults) as server:` serves at `server.url`. `score(prompt, reply)` judges one reply;
`faults(number)` names what goes wrong at a call, or None. Everything asked is kept.
"""

import json
import time
from collections.abc import Callable

from tests.tools import loopback


class ScorerServer(loopback.Server):
    def __init__(
        self,
        score: Callable[[str, str], float | None],
        faults: Callable[[int], str | None] = lambda number: None,
        delay: float = 0.0,
    ):
        super().__init__(_Handler)
        self.score, self.faults, self.delay = score, faults, delay
        self.url = f"{self.address}/score"
        self.calls = 0
        self.asked: list[tuple[str, str]] = []
        self.sizes: list[int] = []
        self.tokens: set[str | None] = set()


class _Handler(loopback.Handler):
    server: ScorerServer

    def serve(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert set(body) == {"prompts", "replies"} and len(body["prompts"]) == len(body["replies"])
        with server.lock:
            fault = server.faults(server.calls)
            server.calls += 1
            server.tokens.add(self.headers["Authorization"])
        time.sleep(server.delay)
        self._answer(fault, list(zip(body["prompts"], body["replies"], strict=True)))

    def _answer(self, fault: str | None, asked: list[tuple[str, str]]):
        server = self.server
        if fault in ("429", "500", "401", "302"):
            more = {"Location": server.url, "Retry-After": "0.05"}
            return self._send(int(fault), b"{}", more)
        if fault == "silence":
            time.sleep(3)
        if fault == "html":
            return self._send(200, b"<html>a proxy's page</html>")
        scores = [server.score(*each) for each in asked]
        if fault == "short":
            scores = scores[1:]
        if fault == "huge":
            return self._send(200, b" " * (17 << 20))
        whole = json.dumps({"scores": scores}).encode()
        if fault == "cut":
            return self._send(200, whole[: len(whole) // 2])
        with server.lock:
            server.asked += asked
            server.sizes.append(len(asked))
        self._send(200, whole)

    def _send(self, status: int, body: bytes, more=None):
        self.over()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # the caller is gone
            self.close_connection = True
