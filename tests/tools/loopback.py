"""A handler enters; a server on loopback leaves. One of POSTs counts how many calls it answers at once."""

import http.server
import threading
import time


class Loopback(http.server.ThreadingHTTPServer):
    """`with Loopback(Handler) as server:` serves at `address`."""

    daemon_threads = True

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Server(Loopback):
    """`most_active`: how many calls were under way at once, at most."""

    def __init__(self, handler: type["Handler"]):
        super().__init__(handler)
        self.lock = threading.Lock()
        self.active = self.most_active = self.begun = 0

    def settle(self, quiet: float = 0.5) -> None:
        """Waits until the calls of a process that was killed are over: none under way, and none begun, for a while."""
        since, seen = time.monotonic(), -1
        while time.monotonic() - since < quiet:
            with self.lock:
                busy, begun = self.active > 0, self.begun
            if busy or begun != seen:
                since, seen = time.monotonic(), begun
            time.sleep(0.01)


class Handler(http.server.BaseHTTPRequestHandler):
    """`serve` answers a POST, and calls `over` before it sends anything."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def serve(self):
        raise NotImplementedError

    def do_POST(self):
        server = self.server
        with server.lock:
            server.active += 1
            server.begun += 1
            server.most_active = max(server.most_active, server.active)
        self._counted = True
        try:
            self.serve()
        finally:
            self.over()

    def over(self):
        """The call counts no longer: before its answer is sent, since the caller may ask again as soon as it has it."""
        if self._counted:
            self._counted = False
            with self.server.lock:
                self.server.active -= 1
