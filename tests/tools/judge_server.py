"""A chat-completions endpoint on loopback: prompts of replies enter, verdicts leave, with the faults a test asks for.

`with JudgeServer(verdict, faults) as server:` serves at `server.url`. `verdict(first, second)` answers a question from
its two replies; `faults(question, attempt)` names what goes wrong at an attempt, or None. Everything asked is kept.
"""

import hashlib
import json
import re
import select
import time
from collections import Counter
from collections.abc import Callable

from tests.tools import loopback

FAULTS = ("429", "500", "silence", "truncated", "cut", "html")
REPLIES = re.compile(r"<reply A>\n(.*?)\n</reply A>.*<reply B>\n(.*?)\n</reply B>", re.DOTALL)


def no_fault(question: str, attempt: int) -> str | None:
    return None


def some_faults(question: str, attempt: int) -> str | None:
    """Each kind at some questions' first attempt, two in a row at some others."""
    number = int(hashlib.sha256(question.encode()).hexdigest(), 16)
    if attempt == 0 and number % 2:
        return FAULTS[number // 2 % len(FAULTS)]
    if attempt == 1 and number % 10 == 1:
        return FAULTS[number // 20 % 2]
    return None


class JudgeServer(loopback.Server):
    def __init__(
        self,
        verdict: Callable[[str, str], str],
        faults: Callable[[str, int], str | None] = no_fault,
        delay: float = 0.0,
        retry_after: str = "0.05",
    ):
        super().__init__(_Handler)
        self.verdict, self.faults, self.delay, self.retry_after = verdict, faults, delay, retry_after
        self.url = f"{self.address}/v1"
        self.attempts: Counter[str] = Counter()  # of each question
        self.answered: Counter[str] = Counter()  # of each question, whole answers sent
        self.given: Counter[str] = Counter()  # of each fault
        self.keys: set[str] = set()
        self.times: list[tuple[float, str]] = []


class _Handler(loopback.Handler):
    server: JudgeServer

    def serve(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, b"{}")
            return
        if "max_tokens" not in body:
            self._send(400, b'{"error": {"message": "Say\\nmax_tokens."}}')
            return
        assert body["model"] and body["temperature"] == 0
        question = body["messages"][0]["content"]
        with server.lock:
            attempt = server.attempts[question]
            server.attempts[question] += 1
            server.keys.add(self.headers["Authorization"])
            fault = server.faults(question, attempt)
            server.given[fault] += fault is not None
            server.times.append((time.monotonic(), fault or ""))
        if server.delay:
            time.sleep(server.delay)
        if fault == "silence":
            # Until the caller gives up: then this call is over, and counts no longer.
            select.select([self.connection], [], [], 30)
            self.close_connection = True
            return
        if fault in ("429", "500"):
            self._send(int(fault), b'{"error": {"message": "later"}}', {"Retry-After": server.retry_after})
            return
        if fault == "html":
            self._send(200, b"<html>a proxy's page</html>", kind="text/html")
            return
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": server.verdict(*REPLIES.search(question).groups())},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        whole = json.dumps(answer).encode()
        if fault == "truncated":  # the body says it is complete
            self._send(200, whole[: len(whole) // 2])
            return
        if fault == "cut":  # the connection breaks in the middle
            self._send(200, whole, cut=len(whole) // 2)
            self.close_connection = True
            return
        with server.lock:
            server.answered[question] += 1
        self._send(200, whole)

    def _send(self, status, body, headers=None, kind="application/json", cut=None):
        self.over()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
