"""A function that writes bytes enters; a server on loopback leaves that answers as no honest server would.

`with RawServer(answer) as server:` serves at `server.address`. `answer(connection, request)` is called for each
request, read whole, and may write what it likes, as slowly as it likes; the connection is closed when it returns.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable


class RawServer:
    def __init__(self, answer: Callable[[socket.socket, bytes], None]):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.requests: list[bytes] = []
        self.ended = threading.Event()
        """To be waited on by what drips, so that it ends with the test."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # closing alone leaves the other thread in accept
        self._listener.close()
        for connection in self._open:
            connection.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket):
        with contextlib.suppress(OSError), connection:
            file = connection.makefile("rb")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (line := file.readline()):
                    return
                head += line
            fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n") if b":" in line)
            request = head + file.read(int(fields.get(b"content-length", 0)))
            self.requests.append(request)
            self._answer(connection, request)

    def drip(self, connection: socket.socket, content: bytes = b"", every: float = 0.05):
        """A byte now and then, until the caller has gone or the test has ended."""
        number = 0
        while not self.ended.wait(every):
            connection.sendall(content[number : number + 1] or b" ")
            number += 1


def whole(body, status: str = "200 OK", more: str = "") -> bytes:
    """An answer with its length. body: bytes, or what is sent as JSON."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n{more}\r\n"
    return head.encode() + sent
