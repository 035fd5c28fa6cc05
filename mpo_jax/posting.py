"""A body and an address enter; the answer of the server there leaves, whole, within a time and a size, or what to do.

For the judge's endpoint and for scorers. Nobody but the server of the address is asked: redirects are refused. No
message holds a header, an address's password, or a secret that a server repeats.
"""

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import os
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mpo_jax.asking import RETRIED, Again, retry_after
from mpo_jax.errors import InputError

_BLOCK = 1 << 16
_TELLING = 8
"""Characters. So long a piece of a secret is one in a text too: a server may repeat it in parts, or quoted."""
_SAID = 1 << 16
"""Bytes that are read of a refusal."""
_GOOD = 200


@dataclasses.dataclass(frozen=True)
class Place:
    """Where to post, and how.

    who: begins every error. address: checked by `wrong_address`. secret: sent as bearer token; "": none. seconds: that
    a whole call may take, from the first byte sent to the last one read. largest: bytes of an answer. hint: what to do
    about a refusal, by its status and what the server says.
    """

    who: str
    address: str
    secret: str = dataclasses.field(repr=False)
    seconds: float
    largest: int
    hint: Callable[[int, bytes], str] = lambda status, said: ""


def wrong_address(address: str) -> str:
    """What is wrong with an address to post to, without repeating it; "" for a good one."""
    expected = "expected an address such as http://HOST:PORT/PATH"
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return expected
    if "@" in parts.netloc or parts.query or parts.fragment:
        return "it holds credentials or a query, which would be written into the run; a key comes from the environment"
    if parts.scheme not in ("http", "https") or not host or port == 0 or not re.fullmatch(r"[!-~]+", address):
        return expected
    return ""


def secret(variable: str) -> str:
    """The value of an environment variable without white space around it; "" where it is not set, or the variable's
    name is empty. InputError, without the value, for one that no header can hold."""
    value = os.environ.get(variable, "").strip() if variable else ""
    if not re.fullmatch(r"[ -~]*", value):
        raise InputError(f"{variable}: expected printable ASCII characters, in one line")
    return value


def hidden(text: str, secret: str) -> str:
    """The text with "[key]" for the secret, and for every long enough piece of it."""
    size = min(_TELLING, len(secret))
    pieces = {secret[start : start + size] for start in range(len(secret) - size + 1)} if size >= 4 else set()
    if not any(piece in text for piece in pieces):
        return text
    told, place = [], 0
    while place < len(text):
        end = place
        while text[end : end + size] in pieces:
            end += 1
        if end > place:
            told.append("[key]")
            place = end + size - 1
        else:
            told.append(text[place])
            place += 1
    return "".join(told)


def readable(text: str) -> str:
    """The text as it can be sent and kept: half a surrogate pair, which models sample at times, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


async def post(place: Place, body: bytes, threads: ThreadPoolExecutor) -> bytes:
    """The body of the answer to a JSON body. `Again` for what may pass: time-outs, broken connections and statuses that
    `asking` knows. InputError for other statuses and for answers that are too large or packed."""
    connection, headers, target = _connection(place)
    call = asyncio.get_running_loop().run_in_executor(threads, _exchange, place, connection, headers, target, body)
    try:
        done, _ = await asyncio.wait({call}, timeout=place.seconds)
        if not done:
            _hang_up(connection)
            await asyncio.wait({call})
            call.exception()
            raise Again(f"no answer within {place.seconds:g} s")
        return call.result()
    finally:
        connection.close()


def _connection(place: Place) -> tuple[http.client.HTTPConnection, dict[str, str], str]:
    """The connection, the headers, and what is asked for there: the path, or of a proxy the whole address.

    The proxy is the one of the environment (HTTPS_PROXY, HTTP_PROXY, NO_PROXY), none for this machine. Packed answers
    are not asked for: a small one may unpack to any size.
    """
    url = urllib.parse.urlsplit(place.address)
    assert url.hostname is not None, "addresses are checked where settings are read"
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    if place.secret:
        headers["Authorization"] = f"Bearer {place.secret}"
    make = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    proxy = _proxy(url.scheme, url.hostname)
    if proxy is None:
        return make(url.hostname, url.port, timeout=place.seconds), headers, url.path or "/"
    connection = make(proxy.hostname or "", proxy.port, timeout=place.seconds)
    pass_ = f"{urllib.parse.unquote(proxy.username or '')}:{urllib.parse.unquote(proxy.password or '')}"
    known = {"Proxy-Authorization": f"Basic {base64.b64encode(pass_.encode()).decode()}"} if proxy.username else {}
    if url.scheme == "https":
        connection.set_tunnel(url.hostname, url.port, known)
        return connection, headers, url.path or "/"
    return connection, headers | known, place.address


def _proxy(scheme: str, host: str) -> urllib.parse.SplitResult | None:
    """The proxy to go through, where the environment names one. InputError, without it, for one that can't be used."""
    found = urllib.request.getproxies().get(scheme, "")
    here = host in ("localhost", "::1") or host.startswith("127.")
    if not found or here or urllib.request.proxy_bypass(host):
        return None
    try:
        parts = urllib.parse.urlsplit(found if "://" in found else f"http://{found}")
        usable = parts.scheme == "http" and parts.hostname and parts.port != 0
    except ValueError:
        usable = None
    if not usable:
        raise InputError(f"{scheme}_proxy: the environment's proxy can't be used; expected http://HOST:PORT")
    return parts


def _exchange(
    place: Place, connection: http.client.HTTPConnection, headers: dict[str, str], target: str, body: bytes
) -> bytes:
    """One request and its answer, in a thread. Errors of the library quote what the server sent: they end here."""
    until, reason, read, whole = time.monotonic() + place.seconds, "", bytearray(), True
    try:
        connection.request("POST", target, body, headers)
        response = connection.getresponse()
        most = place.largest if response.status == _GOOD else _SAID
        whole = (response.length or 0) <= most
        while whole and time.monotonic() < until and (block := response.read1(_BLOCK)):
            read += block
            whole = len(read) <= most
    except TimeoutError:
        until = 0.0
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"no connection ({type(error).__name__})"
    if time.monotonic() >= until:
        raise Again(f"no answer within {place.seconds:g} s")
    if reason:
        raise Again(reason)
    if (status := response.status) in RETRIED or status >= 500:
        raise Again(f"status {status}", retry_after(place.who, dict(response.headers.items())))
    if status != _GOOD:
        hint = "; redirects are not followed" if 300 <= status < 400 else place.hint(status, bytes(read[:_SAID]))
        raise InputError(f"{place.who}: refused with status {status}{hint}")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise InputError(f"{place.who}: its answer is compressed (Content-Encoding), which was not asked for")
    if not whole:
        raise InputError(f"{place.who}: its answer is above {place.largest:,} bytes")
    return bytes(read)


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Ends whatever a thread waits for on it."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
