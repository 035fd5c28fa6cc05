"""A web application enters; its address on loopback leaves, while a real server serves it from a thread."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from mpo_jax.evaluation import annotation_server


@contextlib.contextmanager
def served(application, host="127.0.0.1", **bounds) -> Iterator[str]:
    """bounds: of the server, `seconds` and `most`."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen()
    server = annotation_server.server(application, **bounds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
