"""A real S3 server on this machine, and caches in it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpletuner.data.cache_entries import BucketImageEmbedsOptions
from simpletuner.data.cache_place import BucketPlace

SECRET = "hunter2-the-secret-key"
BUCKET = "caches"


def served() -> Iterator[str]:
    """The server's address, for as long as a fixture lives."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def ask(address: str, text: str = "") -> None:
    """Tell the server something about itself."""
    request = urllib.request.Request(address, data=text.encode(), headers={"Content-Type": "text/plain"}, method="POST")
    urllib.request.urlopen(request, timeout=20).close()


def emptied(endpoint: str) -> Any:
    """A client of the server, which now holds one empty bucket and lets everybody in."""
    boto3 = pytest.importorskip("boto3")
    ask(f"{endpoint}/moto-api/reset")
    ask(f"{endpoint}/moto-api/reset-auth", "inf")
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key=SECRET)
    client.create_bucket(Bucket=BUCKET)
    return client


def keys_of(endpoint: str, **keys: Any) -> dict[str, Any]:
    """An entry of multidatabackend.json but for what it is for."""
    return {
        "type": "aws",
        "aws_bucket_name": BUCKET,
        "aws_endpoint_url": endpoint,
        "aws_region_name": "us-east-1",
        "aws_access_key_id": "key",
        "aws_secret_access_key": SECRET,
        **keys,
    }


def place_in(endpoint: str, machine: Path, folder: str = "vae/set", copies_bytes: int = 1 << 30, **keys: Any) -> BucketPlace:
    """A cache in the bucket.

    Args:
        machine: where this machine has its workplaces.
    """
    return BucketPlace(BucketImageEmbedsOptions(id="there", **keys_of(endpoint, **keys)), folder, machine / "root", copies_bytes)
