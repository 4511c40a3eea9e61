"""A real server on loopback that webhooks are sent to, and that can be slow, refuse, break off, hang, and die."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request, as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    files: dict[str, bytes]
    time: float


class Receiver:
    """Keeps what it took. `answers` holds what to do with the next requests: a status, a (status, headers), or a function of the handler."""

    def __init__(self) -> None:
        self.taken: list[Received] = []
        self.asked = 0
        self.answers: list[Any] = []
        self.always: Any = None
        self.url = ""

    def types(self) -> list[str]:
        return [one.body["type"] for one in self.taken]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.asked += 1
        how = self.answers.pop(0) if self.answers else self.always
        if callable(how):
            how = how(handler)
            if how is None:
                return
        status, headers = how if isinstance(how, tuple) else (how or 204, {})
        if 200 <= status < 300:
            self.taken.append(read(handler.path, handler.headers, body))
        handler.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()


def read(path: str, headers: Message, body: bytes) -> Received:
    kind = headers["Content-Type"]
    if kind == "application/json":
        return Received(path, dict(headers), json.loads(body), {}, time.monotonic())
    parts = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body).get_payload()
    content = {part.get_param("name", header="content-disposition"): part for part in parts}
    files = {part.get_filename(): part.get_payload(decode=True) for part in content.values() if part.get_filename()}
    return Received(path, dict(headers), json.loads(content["payload_json"].get_payload()), files, time.monotonic())


@contextmanager
def receiving(certificate: Path | None = None, answers: list[Any] | None = None, always: Any = None) -> Iterator[Receiver]:
    """Run a receiver while the body runs.

    Args:
        certificate: PEM file with key and certificate, to speak TLS.
    """
    receiver = Receiver()
    receiver.answers, receiver.always = answers or [], always

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.answer(self)

        def log_message(self, *facts: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *facts: Any) -> None:
            pass  # a client that went away

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}/secret-path"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


def hangs(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """Say nothing for so long, and then nothing either."""

    def wait(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)

    return wait


def slowly(seconds: float) -> Callable[[BaseHTTPRequestHandler], int]:
    """Take it after so long."""

    def wait(handler: BaseHTTPRequestHandler) -> int:
        time.sleep(seconds)
        return 204

    return wait


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a word."""
    handler.connection.close()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody trusts, with its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
