"""Nothing enters; a fake of Google Cloud Storage on loopback leaves, its objects in memory: the JSON API as gcsfs,
TensorStore and Google's own client speak it, with generations and their preconditions.

It fails now and then, as networks do: it answers 503, or drops the connection, before or after it has done what it was
asked. As a command (`python -m tests.tools.fake_gcs`) it prints its environment and serves until it is killed.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Mapping
from typing import Any

import google_crc32c

from tests.tools.loopback import Loopback

BUCKET = "bucket"


@dataclasses.dataclass(frozen=True)
class Object:
    name: str
    content: bytes
    generation: int
    updated: str
    metadata: Mapping[str, Any]

    def resource(self) -> dict[str, Any]:
        return {
            "kind": "storage#object", "id": f"{BUCKET}/{self.name}/{self.generation}", "name": self.name,
            "bucket": BUCKET, "generation": str(self.generation), "metageneration": "1", "storageClass": "STANDARD",
            "contentType": "application/octet-stream", "timeCreated": self.updated, "updated": self.updated,
            "size": str(len(self.content)), "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(self.content).digest()).decode(),
            "etag": str(self.generation), "metadata": dict(self.metadata),
        }  # fmt: skip


class Refused(Exception):
    def __init__(self, status: int):
        self.status = status


class Bucket:
    """The objects of the one bucket, and uploads on their way. One thread at a time calls it."""

    def __init__(self):
        self.objects: dict[str, Object] = {}
        self._uploads: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1_700_000_000_000_000)

    def get(self, name: str, query: Mapping[str, str]) -> Object:
        found = self.objects.get(name)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise Refused(404)
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refused(304)
        if query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            raise Refused(412)
        return found

    def put(self, name: str, content: bytes, query: Mapping[str, str], metadata: Mapping[str, Any]) -> Object:
        now = str(self.objects[name].generation) if name in self.objects else "0"
        if query.get("ifGenerationMatch", now) != now or query.get("ifGenerationNotMatch") == now:
            raise Refused(412)
        updated = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        made = Object(name, content, next(self._numbers), updated, metadata)
        self.objects[name] = made
        return made

    def delete(self, name: str, query: Mapping[str, str]) -> None:
        self.get(name, query)
        del self.objects[name]

    def list(self, query: Mapping[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items: list[dict] = []
        prefixes: list[str] = []
        for name in sorted(self.objects):
            begun = name >= query.get("startOffset", "") and name > query.get("pageToken", "")
            ended = "endOffset" in query and name >= query["endOffset"]
            if not name.startswith(prefix) or not begun or ended:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                if (folder := prefix + head + delimiter) not in prefixes:
                    prefixes.append(folder)
                continue
            if len(items) == int(query.get("maxResults", 1000)):
                return {"items": items, "prefixes": prefixes, "nextPageToken": items[-1]["name"]}
            items.append(self.objects[name].resource())
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}

    def begin(self, name: str, query: Mapping[str, str], metadata: Mapping[str, Any]) -> str:
        key = f"upload{next(self._numbers)}"
        self._uploads[key] = {"name": name, "query": query, "metadata": metadata, "content": b"", "made": None}
        return key

    def go_on(self, key: str, chunk: bytes, said: str) -> tuple[Object | None, int]:
        """The object, once its last bytes are there, and the bytes so far. said: Content-Range."""
        upload = self._uploads.get(key)
        if upload is None:
            raise Refused(404)
        if upload["made"] is None:
            found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", said or f"bytes 0-{len(chunk) - 1}/{len(chunk)}")
            if found is None:
                raise Refused(400)
            if found[1] is not None:
                if int(found[1]) > len(upload["content"]):
                    raise Refused(400)
                upload["content"] = upload["content"][: int(found[1])] + chunk
            if found[3] != "*" and len(upload["content"]) == int(found[3]):
                upload["made"] = self.put(upload["name"], upload["content"], upload["query"], upload["metadata"])
        return upload["made"], len(upload["content"])


class Server(Loopback):
    """`with Server() as server:` serves. fail_every: of so many calls, one fails; 0: none. `failed`: how many have."""

    def __init__(self, fail_every: int = 0):
        self.bucket, self.lock = Bucket(), threading.Lock()
        self.fail_every, self.calls, self.failed = fail_every, 0, 0
        super().__init__(_Handler)

    @property
    def environment(self) -> dict[str, str]:
        """What tells a process of it."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket this is
        }

    def names(self, prefix: str = "") -> list[str]:
        """Of all objects that begin with a prefix."""
        with self.lock:
            return sorted(name for name in self.bucket.objects if name.startswith(prefix))

    def content(self, name: str) -> bytes:
        with self.lock:
            return self.bucket.objects[name].content

    def put(self, name: str, content: bytes) -> None:
        with self.lock:
            self.bucket.put(name, content, {}, {})

    def handle_error(self, request, client_address):
        """A client that was killed in the middle is no news; what is wrong here is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


Answer = tuple[int, bytes, dict[str, str]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: of two, the second waits for the client's acknowledgement
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_):
        pass

    def _serve(self) -> None:
        body = self._body()
        with self.server.lock:
            self.server.calls += 1
            fails = bool(self.server.fail_every) and self.server.calls % self.server.fail_every == 0
            self.server.failed += fails
            kind = self.server.failed % 3 if fails else None
            answer: Answer = (503, b"", {})
            if kind in (None, 1):
                answer = self._answer(self.command, self.path, body)
        if kind in (1, 2):  # 1: done, but not said; 2: neither
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        status, content, headers = answer
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, method: str, path: str, body: bytes) -> Answer:
        place, _, query = path.partition("?")
        try:
            return self._route(method, place, dict(urllib.parse.parse_qsl(query, keep_blank_values=True)), body)
        except Refused as refused:
            return refused.status, json.dumps({"error": {"code": refused.status, "message": "refused"}}).encode(), {}

    def _route(self, method: str, place: str, query: dict[str, str], body: bytes) -> Answer:
        bucket = self.server.bucket
        found = re.fullmatch(r"(/upload|/download)?(?:/resumable)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", place)
        if found is None or found[2] != BUCKET:
            raise Refused(404)
        if found[1] == "/upload":
            return self._upload(query, body)
        if place.endswith(f"/b/{BUCKET}"):
            return _json({"kind": "storage#bucket", "id": BUCKET, "name": BUCKET, "location": "US"})
        if found[3] is None:
            return _json(bucket.list(query))
        copied = re.fullmatch(rf"(.+)/(?:copyTo|rewriteTo)/b/{BUCKET}/o/(.+)", found[3])
        if copied and method == "POST":
            source = bucket.get(urllib.parse.unquote(copied[1]), {})
            made = bucket.put(urllib.parse.unquote(copied[2]), source.content, query, source.metadata).resource()
            return _json(made if "/copyTo/" in place else {"done": True, "resource": made})
        name = urllib.parse.unquote(found[3])
        if method == "DELETE":
            bucket.delete(name, query)
            return 204, b"", {}
        known = bucket.get(name, query)
        if query.get("alt") != "media" and found[1] != "/download":
            return _json(known.resource())
        return self._media(known)

    def _media(self, known: Object) -> Answer:
        resource = known.resource()
        headers = {
            "Content-Type": "application/octet-stream", "ETag": resource["etag"], "Accept-Ranges": "bytes",
            "x-goog-generation": resource["generation"], "x-goog-metageneration": "1",
            "x-goog-stored-content-length": resource["size"],
            "x-goog-hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, known.content, headers
        size = len(known.content)
        first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first >= size:
            raise Refused(416)
        return 206, known.content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"}

    def _upload(self, query: dict[str, str], body: bytes) -> Answer:
        bucket, kind = self.server.bucket, query.get("uploadType")
        if "upload_id" in query:
            made, size = bucket.go_on(query["upload_id"], body, self.headers.get("Content-Range", ""))
            if made is None:
                return 308, b"", {"Range": f"bytes=0-{size - 1}"} if size else {}
            return _json(made.resource())
        if kind == "resumable":
            metadata = json.loads(body or b"{}")
            key = bucket.begin(query.get("name") or metadata["name"], query, metadata.get("metadata", {}))
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={key}"
            return 200, b"{}", {"Location": place}
        if kind == "multipart":
            described, content = _parts(body, self.headers["Content-Type"])
            metadata = json.loads(described)
            name = query.get("name") or metadata["name"]
            return _json(bucket.put(name, content, query, metadata.get("metadata", {})).resource())
        return _json(bucket.put(query["name"], body, query, {}).resource())


def _json(value: Any) -> Answer:
    return 200, json.dumps(value).encode(), {}


def _parts(body: bytes, content_type: str) -> list[bytes]:
    """The contents of a multipart body, without their headers."""
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    assert found is not None, content_type
    parts = re.split(rb"(?:\r?\n)?--" + re.escape(found[1].encode()) + rb"(?:--)?\r?\n?", body)
    return [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts if part.strip()]


if __name__ == "__main__":
    with Server(int(sys.argv[1]) if len(sys.argv) > 1 else 0) as started:
        print(json.dumps(started.environment), flush=True)
        threading.Event().wait()
