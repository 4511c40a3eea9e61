"""Entries of a cache in a bucket, written and looked at."""

from __future__ import annotations

import time
from collections.abc import Callable

from simpletuner.data.cache_place import BucketPlace
from simpletuner.data.store import Store, key_of
from tests.builders.s3 import BUCKET
from tests.builders.shards import same, tensors


def key(number: int) -> str:
    return key_of(number=number)


def fill(place: BucketPlace, numbers: range, *, closes: bool = True) -> Store:
    store = Store(place)
    store.put_many((key(number), tensors(number), {"kind": "latents", "sample": f"cats/{number}.png", "vae": "a" * 32}) for number in numbers)
    if closes:
        store.close()
    return store


def is_all_there(place: BucketPlace, numbers) -> bool:
    store = Store(place)
    return store.keys() == {key(number) for number in numbers} and all(same(store.get(key(number)), tensors(number)) for number in numbers)


def objects(client) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", ())]


def shards(client) -> list[str]:
    return [name for name in objects(client) if name.endswith(".safetensors")]


def requests_of(store: Store) -> list[str]:
    """What this store asks the server for from now on."""
    asked: list[str] = []
    store._shelf._bucket._client.meta.events.register("before-send.s3", lambda event_name, **_: asked.append(event_name.rsplit(".", 1)[1]))
    return asked


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)
