"""A hub on this machine that takes models: as much of it as huggingface_hub asks for when it publishes."""

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
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret_of_the_tests"


@dataclass
class HubServer:
    """What was asked of the server and what it holds."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by repository and path."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """Messages, the first one first."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""
    role: str = "write"
    failing: dict[str, list[int]] = field(default_factory=dict)
    """Part of a path to the answers that it gives first, one a request; 0 drops the connection."""
    gate: threading.Event = field(default_factory=threading.Event)
    """A commit is answered once this is set."""
    large: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate.set()


def handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.asked.append(f"{self.command} {path}")
            for part, codes in hub.failing.items():
                if part in path and codes:
                    self.fail(codes.pop(0))
                    return
            if not path.startswith("/large/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.send(401, {"error": "Invalid username or password."})
                return
            self.send(*self.content(path, body))

        def content(self, path: str, body: bytes) -> tuple[int, Any]:
            told = json.loads(body) if body[:1] == b"{" and not path.endswith("/commit/main") else {}
            if path == "/api/whoami-v2":
                orgs = [{"name": "studio", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]
                return 200, {"type": "user", "name": "ada", "orgs": orgs, "auth": {"type": "access_token", "accessToken": {"role": hub.role}}}
            if path == "/api/repos/create":
                name = f"{told['organization'] or 'ada'}/{told['name']}"
                is_there = name in hub.repositories
                hub.repositories.setdefault(name, {})
                hub.private.setdefault(name, told.get("visibility") == "private" or told.get("private") is True)
                return (409 if is_there else 200), {"url": f"{hub.address}/{name}", "name": name}
            if path == "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            if path.endswith("/preupload/main"):
                modes = {file["path"]: "lfs" if file["path"].endswith((".safetensors", ".jpg")) else "regular" for file in told["files"]}
                return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
            if path.endswith("/info/lfs/objects/batch"):
                objects = [{**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}} for one in told["objects"]]
                return 200, {
                    "transfer": "basic",
                    "objects": [{"oid": one["oid"], "size": one["size"]} if one["oid"] in hub.large else one for one in objects],
                }
            if path.startswith("/large/"):
                assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
                hub.large[path.rpartition("/")[2]] = body
                return 200, {}
            if path.endswith("/commit/main"):
                return self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
            return 404, {"error": "not here"}

        def commit(self, repository: str, body: bytes) -> tuple[int, Any]:
            hub.gate.wait(30)
            files = hub.repositories[repository]
            for row in map(json.loads, body.splitlines()):
                value = row["value"]
                if row["key"] == "header":
                    hub.commits.append(value["summary"])
                elif row["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            oid = f"{len(hub.commits):040d}"
            return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{repository}/commit/{oid}", "hookOutput": ""}

        def fail(self, code: int) -> None:
            if code:
                self.send(code, {"error": "the server says no"})
            else:
                self.close_connection = True
                self.connection.close()

        def send(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of a test's business."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve for the length of a block."""
    hub = HubServer()
    server = _Quiet(("127.0.0.1", 0), handler_of(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
