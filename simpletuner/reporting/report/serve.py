"""The report of a run, served live to this machine alone: the page, its figures, and its pictures, and nothing else of the folder."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from simpletuner.errors import ConfigError
from simpletuner.reporting.report.page import GALLERY, Pictures, as_html, content_of, texts_of
from simpletuner.reporting.report.state import STATE_FILE, State, load

LOOPBACK = "127.0.0.1"
USUAL_PORT = 8350
PREVIEWS = "previews"
PREVIEW_SECONDS = 120.0
"""How old a picture that is being made may be, to count as such."""
HOSTS = ("127.0.0.1", "localhost")
"""Names by which browsers may ask: a page of somebody else's, whose name leads here, may not."""


class Server(ThreadingHTTPServer):
    """Serves one run. Answers are made one at a time."""

    daemon_threads = True

    def __init__(self, output_dir: Path, port: int) -> None:
        """
        Args:
            port: 0 is any that is free.
        """
        self.output_dir, self.pictures, self.lock = output_dir, Pictures(output_dir), threading.Lock()
        super().__init__((LOOPBACK, port), Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def content(self) -> dict[str, Any]:
        """What the page shows now."""
        now = time.time()
        state = load(self.output_dir) or State(began=now, updated=now, facts={"name": self.output_dir.resolve().name})
        content = content_of(self.output_dir, state, self.pictures, link=lambda path: address("picture", path))
        return {**content, "previews": self.previews()}

    def previews(self) -> list[dict[str, str]]:
        """Pictures that are being made, the newest first."""
        newest = sorted(self.files(PREVIEWS), key=lambda path: -path.stat().st_mtime)
        found = []
        for path in newest:
            if time.time() - path.stat().st_mtime < PREVIEW_SECONDS:
                said = texts_of(path)
                found.append({"address": address("preview", path), "prompt": said.get("prompt", ""), "sampling_step": said.get("sampling_step", "")})
        return found

    def files(self, folder: str) -> list[Path]:
        place = self.output_dir / folder
        return [path for path in place.iterdir() if path.is_file() and not path.is_symlink()] if place.is_dir() else []

    def picture(self, kind: str, name: str) -> bytes:
        """A picture that the page names; nothing if it is none."""
        if kind == "picture":
            return next((self.pictures.small(one.path) for one in self.pictures.there() if one.path.name == name), b"")
        path = next((path for path in self.files(PREVIEWS) if path.name == name and path.suffix == ".jpg"), None)
        return path.read_bytes() if path else b""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def do_GET(self) -> None:
        if (self.headers.get("Host") or "").rpartition(":")[0] not in HOSTS:
            self.send_error(403, "ask by 127.0.0.1")
            return
        try:
            with self.server.lock:
                found = self._find(urlsplit(self.path).path)
        except OSError:  # a file that is just being replaced
            self.send_error(503)
            return
        if found is None:
            self.send_error(404)
            return
        kind, data = found
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "max-age=3600" if kind.startswith("image/") else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def _find(self, path: str) -> tuple[str, bytes] | None:
        """The kind and the bytes of what a path names; nothing else of the folder has one."""
        if path == "/":
            return "text/html; charset=utf-8", as_html("report", self.server.content(), is_live=True).encode(errors="replace")
        if path == "/content.json":
            text = json.dumps({**self.server.content(), "live": True}, ensure_ascii=False, default=str)
            return "application/json; charset=utf-8", text.encode(errors="replace")
        kind, _, name = path.removeprefix("/").partition("/")
        data = self.server.picture(kind, unquote(name, errors="surrogateescape")) if kind in ("picture", "preview") else b""
        return ("image/webp" if kind == "picture" else "image/jpeg", data) if data else None

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""


def address(kind: str, path: Path) -> str:
    """Where the page finds a picture; another one when the file has changed."""
    return f"{kind}/{quote(path.name, safe='', errors='surrogateescape')}?{path.stat().st_mtime_ns}"


def open_server(output_dir: Path, port: int | None) -> Server:
    """Begin to listen.

    Args:
        port: the usual one if not given, or any if that is taken.

    Raises:
        ConfigError: there is no run in the folder, or the port is taken.
    """
    if not any((output_dir / name).exists() for name in (STATE_FILE, GALLERY, ".lock")):
        raise ConfigError(f"there is no run in {output_dir}", hint="Give the output_dir of a run, begun or ended.")
    for tried in (USUAL_PORT, 0) if port is None else (port,):
        try:
            return Server(output_dir, tried)
        except OSError as error:
            if port is not None:
                raise ConfigError(f"--port {port} cannot be used: {error.strerror}", hint="Leave --port out, and a free one is taken.") from error
    raise ConfigError("no port is free", hint="Give one with --port.")
