"""A folder enters; a server on loopback leaves that serves it as a gated model of the Hugging Face hub, revision by
revision, to whoever brings its token. `served` counts the downloads of each file."""

import collections
import hashlib
import http.server
import json
import re
from pathlib import Path

from tests.tools.loopback import Loopback

NAME, TOKEN = "owner/model", "hf_secret_of_this_test"


class Server(Loopback):
    """`with Server(folder) as server:` serves; HF_ENDPOINT is `address`. `publish` makes a new revision."""

    def __init__(self, folder: Path):
        self.served: collections.Counter[str] = collections.Counter()
        self.revisions: dict[str, dict[str, bytes]] = {}
        self.moving = False  # whether the main branch has a new revision whenever it is asked for
        self.cut = ""  # the file whose next download breaks off in the middle
        self.publish({file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})
        super().__init__(_Handler)

    def publish(self, files: dict[str, bytes]) -> str:
        self.main = hashlib.sha1(str(len(self.revisions)).encode()).hexdigest()
        self.revisions[self.main] = files
        return self.main


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"})
        listed = re.fullmatch(rf"/api/models/{NAME}(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path)
        asked = listed[2] if listed else file[1] if file else ""
        if self.server.moving and asked in (None, "main"):
            self.server.publish(self.server.revisions[self.server.main])
        revision = self.server.main if asked in (None, "main") else asked
        files = self.server.revisions.get(revision)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if listed:
            tree = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": _etag(files[name])} for name in files
            ]
            siblings = [{"rfilename": name} for name in files]
            told = tree if listed[1] == "tree" else {"id": NAME, "sha": revision, "siblings": siblings}
            return self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        if file is None or file[2] not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        content = files[file[2]]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.served[file[2]] += 1
        if (begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and int(begin[1]):
            place = {"Content-Range": f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"}
            return self._send(206, content[int(begin[1]) :], headers | place)
        if self.command == "GET" and self.server.cut == file[2]:
            self.server.cut, self.close_connection = "", True
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return None
        return self._send(200, content, headers)

    do_HEAD = do_GET

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
