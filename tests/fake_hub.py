"""The few routes of the Hub that an upload asks for, served on this machine: no network is touched."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_thetoken"


@dataclass
class FakeHub:
    """What the server holds and how it answers.

    Attributes:
        repositories: name to {"private": bool, "branches": {branch: {path: bytes}}}.
        refuse: "METHOD path-prefix" to (status, message): such requests are refused.
        role: of the token.
        requests: "METHOD path" of each.
    """

    endpoint: str = ""
    role: str = "write"
    owner: str = "me"
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        found: dict[str, bytes] = self.repositories[name]["branches"][branch]
        return found

    def answer(self, method: str, path: str, authorised: bool, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        self.requests.append(f"{method} {path}")
        for start, (status, message) in self.refuse.items():
            if f"{method} {path}".startswith(start):
                return status, {"error": message}
        if method == "PUT" and path.startswith("/objects/"):  # signed addresses need no token
            oid = path.removeprefix("/objects/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        if not authorised:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": self.owner, "type": "user", "auth": {"accessToken": {"role": self.role}}, "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._large(entry) for entry in json.loads(body)["objects"]]}
        parts = path.split("/")  # /api/models/OWNER/NAME/VERB/REVISION
        name, verb, branch = "/".join(parts[3:5]), "".join(parts[5:6]), "/".join(parts[6:]) or "main"
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        branches = self.repositories[name]["branches"]
        if verb == "":
            return 200, {"id": name, "private": self.repositories[name]["private"], "siblings": [], "sha": "0" * 40}
        if verb == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return 200, {}
        if branch not in branches:
            return 404, {"error": "Revision not found"}
        if verb == "preupload":
            files = json.loads(body)["files"]
            return 200, {"files": [self._mode(entry) for entry in files]}
        if verb == "commit":
            self._commit(branches[branch], body)
            oid = hashlib.sha1(body).hexdigest()
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid}
        return 404, {"error": f"no route {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization'] or self.owner}/{asked['name']}"
        address = {"url": f"{self.endpoint}/{name}", "name": name, "id": "0"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **address}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[name] = {"private": private, "branches": {"main": {}}}
        return 200, address

    def _mode(self, entry: dict[str, Any]) -> dict[str, Any]:
        large = entry["path"].endswith(".safetensors")
        return {"path": entry["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _large(self, entry: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] in self.objects:
            return found
        return {**found, "actions": {"upload": {"href": f"{self.endpoint}/objects/{entry['oid']}", "header": {}}}}

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub on a free port of this machine, until the context ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, data = hub.answer(self.command, self.path.partition("?")[0], authorised, body)
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
