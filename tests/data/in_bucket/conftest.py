"""A server of buckets for these tests, and machines that keep caches in one of its buckets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simpletuner.data import bucket_shelf
from simpletuner.data.cache_place import BucketPlace
from tests.builders.s3 import emptied, place_in, served

endpoint = pytest.fixture(scope="module", name="endpoint")(served)


@pytest.fixture
def client(endpoint):
    return emptied(endpoint)


@pytest.fixture(autouse=True)
def small_disk(monkeypatch) -> None:
    """Machines on which tests run may have little room."""
    monkeypatch.setattr(bucket_shelf, "FREE_BYTES", 0)


@pytest.fixture
def machine(endpoint, client, tmp_path) -> Callable[..., BucketPlace]:
    """The place as one machine sees it."""

    def make(name: str = "one", **keys) -> BucketPlace:
        return place_in(endpoint, tmp_path / name, **keys)

    return make
