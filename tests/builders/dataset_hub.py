"""A hub on this machine with one dataset of parquet files: as much of it as the client of `datasets` asks for."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy
import pyarrow
import pyarrow.parquet
from PIL import Image

COMMIT = "e" * 40
CARD = """\
---
dataset_info:
  config_name: mnist
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': '0', '1': '1', '2': '2', '3': '3', '4': '4', '5': '5', '6': '6', '7': '7', '8': '8', '9': '9'}}}}
configs:
- config_name: mnist
  data_files:
  - {split: train, path: mnist/train-*}
  - {split: test, path: mnist/test-*}
  default: true
---
"""
"""README.md of MNIST on the hub, as far as it is read."""


def digits_parquet(count: int, first_seed: int) -> bytes:
    """Grey pictures of 28x28 noise with the labels 0, 1, 2, ... in the columns that MNIST has on the hub."""
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(numpy.random.default_rng(first_seed + number).integers(0, 255, (28, 28), dtype=numpy.uint8)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": number % 10})
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@contextmanager
def dataset_hub(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve a dataset for the length of a block, and give the address for HF_ENDPOINT."""
    tree = [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for name, content in files.items()]
    folders = sorted({name.rpartition("/")[0] for name in files} - {""})
    tree += [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
    info = {"id": repository, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in files]}
    api, resolve = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"{api}/tree/"):
                folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                self.send(200, json.dumps([entry for entry in tree if str(entry["path"]).rpartition("/")[0] == folder]).encode())
            elif path.startswith(api):
                self.send(200, json.dumps(info).encode())
            elif path.startswith(resolve) and (name := path.removeprefix(resolve).partition("/")[2]) in files:
                self.send(200, files[name], ETag=f'"{hashlib.sha256(files[name]).hexdigest()}"')
            else:
                self.send(404, b"", **{"X-Error-Code": "EntryNotFound"})

        def send(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
