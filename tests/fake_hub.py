"""A hub on loopback: as much of its HTTP as `huggingface_hub` speaks to create, fill and read a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"


@dataclass
class Hub:
    """`repositories`: by name, its files. `private`: the names of those created so. `messages`: the commits'. `cards`: those
    whose metadata were sent to be checked. Reading needs no token here."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)

    def commit(self, name: str) -> str:
        """The commit that holds the repository's present files."""
        content = json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in sorted(self.repositories[name].items())})
        return hashlib.sha1(content.encode()).hexdigest()


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: object, status: int = 200, **headers: str) -> None:
            self.reply(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def missing(self) -> None:
            self.json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlsplit(self.path).path)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.json({"error": "Invalid credentials"}, 401)
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                if name not in hub.repositories:
                    hub.repositories[name] = {}
                    if asked.get("private") or asked.get("visibility") == "private":
                        hub.private.add(name)
                return self.json({"url": f"{hub.url}/{name}", "name": name})
            if path == "/api/validate-yaml":
                hub.cards.append(json.loads(body)["content"])
                return self.json({"errors": [], "warnings": []})
            owner, repository, action = path.removeprefix("/api/models/").split("/")[:3]
            files = hub.repositories.get(f"{owner}/{repository}")
            if files is None:
                return self.missing()
            if action == "preupload":
                asked = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.json({"files": asked})
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "header":
                    hub.messages.append(operation["value"]["summary"])
                else:
                    files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            sha = hub.commit(f"{owner}/{repository}")
            address = f"{hub.url}/{owner}/{repository}/commit/{sha}"
            return self.json({"success": True, "commitOid": sha, "commitUrl": address, "pullRequestUrl": None})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).strip("/")
            api = path.startswith("api/models/")
            owner, repository, action, *rest = [*path.removeprefix("api/models/").split("/"), ""]
            name = f"{owner}/{repository}"
            files = hub.repositories.get(name)
            if files is None:
                return self.missing()
            sha = hub.commit(name)
            if api and action == "tree":
                return self.json([_entry(key, content) for key, content in files.items()])
            if api:
                siblings = [{"rfilename": key, "size": len(content)} for key, content in files.items()]
                return self.json({"id": name, "sha": sha, "private": name in hub.private, "siblings": siblings})
            content = files.get("/".join(rest[1:]).strip("/"))
            if action != "resolve" or content is None:
                return self.json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
