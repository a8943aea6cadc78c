"""A Hugging Face Hub on this machine, as far as making a repository and committing small files to it goes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub(ThreadingHTTPServer):
    """Repositories by name; each is a mapping of path to bytes."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses = refuses
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub(refuses: bool = False):
    """A hub that listens for the length of the block."""
    hub = FakeHub(refuses)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.refuses:
            self._answer({"error": "You are not allowed to do that."}, 403)
        elif self.path == "/api/repos/create":
            tree = json.loads(body)
            name = f"{tree['organization']}/{tree['name']}" if tree.get("organization") else tree["name"]
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = bool(tree.get("private", tree.get("visibility") == "private"))
            self._answer({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer({"error": f"no {self.path} here"}, 404)

    def do_GET(self) -> None:
        if "/revision/" in self.path or self.path.startswith("/api/models/"):
            self._answer({"id": self._repository(), "sha": "0" * 40, "siblings": [], "tags": []})
        else:
            self._answer({"name": "me", "type": "user", "orgs": []})

    def _commit(self, body: bytes) -> None:
        repository = self.server.repositories[self._repository()]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.server.commits += 1
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.server.url}/{self._repository()}/commit/{oid}"
        self._answer({"commitUrl": url, "commitOid": oid, "success": True})

    def _repository(self) -> str:
        return "/".join(self.path.split("/")[3:5])

    def _chunks(self) -> bytes:
        parts = []
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def _answer(self, tree: dict, code: int = 200) -> None:
        data = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return
