"""An application and a listening socket enter; requests are answered, each within a time, from so many callers at once.

uvicorn bounds neither how long a request may take to arrive or an answer to be read, nor how many connections wait: a
few hundred that send a byte now and then use up a process's files. Here each has `SECONDS` for a request and its
answer, and beyond `MOST` the one that is at it longest is hung up on: an honest one is through in milliseconds.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 20.0
MOST = 128
"""Connections. Some systems allow a process 256 files."""


def serve(application: ASGIApp, listener: socket.socket) -> None:
    """Until it is told to stop (Ctrl-C, SIGTERM)."""
    server(application).run(sockets=[listener])


def server(application: ASGIApp, seconds: float = SECONDS, most: int = MOST) -> uvicorn.Server:
    """seconds: for a request and its answer. most: connections at a time."""
    under_way: dict[H11Protocol, None] = {}  # the one whose request has been due longest first

    class Bounded(H11Protocol):
        """A connection, with the time at which its request and answer must be through."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin()
            if len(under_way) > most:
                next(iter(under_way)).transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._begin()  # before requests that wait behind this one; what is not read yet has this time too
            super().on_response_complete()

        def _begin(self) -> None:
            self._end()
            under_way[self] = None
            self._deadline = self.loop.call_later(seconds, self.transport.abort)

        def _end(self) -> None:
            under_way.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()

    config = uvicorn.Config(
        application, http=Bounded, log_level="warning", ws="none", server_header=False, timeout_graceful_shutdown=2
    )
    return uvicorn.Server(config)
