"""A cache in a bucket: reading asks the server seldom, and the tools for caches work on it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.data import bucket_shelf, shard_writer
from simpletuner.data.cache_export import export
from simpletuner.data.cache_tools import cache_folders, check, find_unused, rewrite, survey, take_stock, to_rewrite
from simpletuner.data.store import DamagedEntry, Store
from simpletuner.errors import DatasetError
from tests.builders.bucket_caches import fill, is_all_there, key, objects, requests_of, shards, wait_until
from tests.builders.s3 import BUCKET, SECRET
from tests.builders.shards import same, tensors


def test_reading_epochs_costs_a_request_a_shard_and_a_few(machine, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", shard_writer.HEADER_BYTES + 3_000)
    fill(machine("one"), range(60))
    store = Store(machine("two"))
    store.keys()
    count = len(store._catalogue._sealed.names)
    asked = requests_of(store)

    def read() -> None:
        assert all(same(store.get(key(number)), tensors(number)) for number in range(60))

    read()
    wait_until(lambda: len(list(machine("two").workplace.glob(".copies/*.safetensors"))) == count)
    first = len(asked)
    for _ in range(5):
        read()

    assert count > 3 and len(asked) == first <= 60 + 2 * count
    again = Store(machine("two"))
    again.keys()
    asked = requests_of(again)
    assert all(same(again.get(key(number)), tensors(number)) for number in range(60)) and asked == []


def test_what_this_machine_made_is_never_asked_for(machine):
    fill(machine(), range(30))
    store = Store(machine())
    store.keys()
    asked = requests_of(store)

    assert all(same(store.get(key(number)), tensors(number)) for number in range(30))

    assert asked == []


def test_without_room_for_copies_each_entry_is_one_request(machine, tmp_path):
    fill(machine("one"), range(20))
    store = Store(machine("two", copies_bytes=0))
    store.keys()
    asked = requests_of(store)

    for _ in range(2):
        assert all(same(store.get(key(number)), tensors(number)) for number in range(20))

    wait_until(lambda: "HeadObject" in asked)
    assert asked.count("GetObject") == 40 and asked.count("HeadObject") == 1
    assert list(tmp_path.rglob(".copies/*")) == list((tmp_path / "one").rglob(".copies/*"))


def test_copies_of_what_is_gone_are_deleted(machine, client):
    fill(machine(), range(5))
    [name] = shards(client)
    assert len(list(machine().workplace.glob(".copies/*"))) == 1
    client.delete_object(Bucket=BUCKET, Key=name)

    Store(machine()).sweep()

    assert list(machine().workplace.glob(".copies/*")) == [] and Store(machine()).keys() == set()


def test_damage_in_the_bucket_is_found_and_named(machine, client):
    fill(machine("one"), range(5))
    [name] = shards(client)
    data = bytearray(client.get_object(Bucket=BUCKET, Key=name)["Body"].read())
    stock = take_stock(machine("two"))
    place = dict(stock.places(stock.is_current))[bytes.fromhex(key(3))]
    data[place.offset + place.length - 1] ^= 1
    client.put_object(Bucket=BUCKET, Key=name, Body=bytes(data))

    damaged, faults = check(machine("two"), stock, lambda count: None)
    with pytest.raises(DamagedEntry):
        Store(machine("two")).get(key(3))

    assert [(one.key, one.about["sample"]) for one in damaged] == [(key(3), "cats/3.png")] and faults == {}


def test_a_check_reads_many_entries_at_once(machine, monkeypatch):
    fill(machine("one"), range(200))
    place = machine("two", copies_bytes=0)
    asked: list[str] = []
    real = bucket_shelf.Bucket.read
    monkeypatch.setattr(bucket_shelf.Bucket, "read", lambda self, *arguments: asked.append(arguments[0]) or real(self, *arguments))

    assert check(place, take_stock(place), lambda count: None) == ([], {})

    assert len(asked) <= 5  # the index twice, the header twice, and all entries together


def test_clearing_out_uploads_before_it_deletes(machine, client):
    for start in range(0, 40, 10):
        fill(machine("one"), range(start, start + 10))
    reader = Store(machine("two", copies_bytes=0))
    reader.keys()
    place, used = machine("three"), {key(number) for number in range(0, 40, 3)}
    unused = find_unused(take_stock(place), used, None)
    names = to_rewrite(take_stock(place), unused.places)
    Store(place).drop(unused.places)
    deleted: list[int] = []
    shelf = bucket_shelf.BucketShelf
    real = shelf.delete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf, "delete", lambda self, name: (deleted.append(len(shards(client))), real(self, name))[1])
        rewrite(place, take_stock(place), names, lambda count: None)

    assert deleted[0] == 5 and len(shards(client)) == 1
    assert is_all_there(machine("four"), range(0, 40, 3))
    assert all(same(reader.get(key(number)), tensors(number)) for number in range(0, 40, 3))
    assert survey(place)[0].used is None


def test_an_export_from_a_bucket_is_read_without_us(machine, tmp_path):
    fill(machine("one"), range(6))

    export(machine("two"), tmp_path / "to", take_stock(machine("two")), lambda count: None, is_one_file_each=False)

    assert json.loads((tmp_path / "to/index.json").read_text())["entries"].keys() == {key(number) for number in range(6)}


def test_what_is_refused_for_its_size_is_let_go_of(machine, client):
    client.put_object(Bucket=BUCKET, Key="vae/set/large", Body=bytes(1000))
    bucket = bucket_shelf.Bucket(machine().options, "vae/set")
    bodies: list[Any] = []
    bucket._client.meta.events.register("after-call.s3.GetObject", lambda parsed, **_: bodies.append(parsed["Body"]))

    with pytest.raises(DatasetError, match=r"large .* has 1,000 bytes or more"):
        bucket.read("large", limit_bytes=1000)

    assert [body._raw_stream.closed for body in bodies] == [True]
    assert len(bucket.read("large", limit_bytes=1001)) == 1000


def test_a_workplace_is_no_cache_folder(machine, tmp_path):
    fill(machine(), range(3), closes=False)

    assert cache_folders([tmp_path]) == []


def test_nothing_on_disk_or_in_the_bucket_holds_the_secret(machine, client, tmp_path):
    fill(machine(), range(3))

    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert all(SECRET.encode() not in client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in objects(client))
    assert SECRET not in repr(machine()) + str(machine())
