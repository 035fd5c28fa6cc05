"""A web application enters; its address on loopback leaves, while a real server serves it from a thread."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn


@contextlib.contextmanager
def served(application, host="127.0.0.1") -> Iterator[str]:
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
