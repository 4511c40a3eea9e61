"""A damaged copy on one machine's disk costs that machine a request, and no machine an entry."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from simpletuner.cli.commands.cache import verify
from simpletuner.console import Console
from simpletuner.data import bucket_shelf
from simpletuner.data.cache_export import export
from simpletuner.data.cache_tools import check, rewrite, take_stock
from simpletuner.data.store import DamagedEntry, Store
from tests.builders.bucket_caches import fill, is_all_there, key, shards, wait_until
from tests.builders.s3 import BUCKET
from tests.builders.shards import same, tensors
from tests.builders.syncs import replace_fsync

COUNT = 12


def copies(place) -> list[Path]:
    return sorted(place.workplace.glob(".copies/*"))


def flipped(data: bytes, place) -> bytes:
    """A bit of the last byte of each entry changed, the index whole."""
    stock, changed = take_stock(place), bytearray(data)
    for _, one in stock.places(stock.is_current):
        changed[one.offset + one.length - 1] ^= 1
    return bytes(changed)


HARMS = {
    "shortened": lambda data, place: data[: len(data) // 2],
    "shortened by a byte": lambda data, place: data[:-1],
    "emptied": lambda data, place: b"",
    "zeroed": lambda data, place: bytes(len(data)),
    "entries flipped": flipped,
    "index flipped": lambda data, place: data[:-30] + bytes([data[-30] ^ 1]) + data[-29:],
}


@pytest.fixture(params=HARMS)
def harmed(machine, request) -> Path:
    """The one copy of a cache of one shard, on machine one, with something wrong with it."""
    fill(machine("one"), range(COUNT))
    [copy] = copies(machine("one"))
    copy.write_bytes(HARMS[request.param](copy.read_bytes(), machine("one")))
    return copy


def test_every_entry_is_read_all_the_same_and_the_copy_is_fetched_anew(machine, harmed):
    before = harmed.read_bytes()
    store = Store(machine("one"))

    assert store.keys() == {key(number) for number in range(COUNT)}
    assert all(same(store.get(key(number)), tensors(number)) for number in range(COUNT))

    wait_until(harmed.exists)
    assert harmed.read_bytes() != before
    assert take_stock(machine("one")).faults == {}


def test_a_check_finds_the_bucket_whole_deletes_the_copy_and_nothing_else(machine, client, harmed):
    there = client.get_object(Bucket=BUCKET, Key=shards(client)[0])["Body"].read()

    code = verify([machine("one")], [], argparse.Namespace(delete=True, json=False), Console())

    assert code == 0 and not harmed.exists()
    assert [client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in shards(client)] == [there]
    assert is_all_there(machine("two"), range(COUNT)) and is_all_there(machine("one"), range(COUNT))


def test_clearing_out_and_exports_take_what_is_in_the_bucket(machine, client, harmed, tmp_path):
    place = machine("one")
    assert export(place, tmp_path / "plain", take_stock(place), lambda count: None, is_one_file_each=False) == []
    stock = take_stock(place)

    rewrite(place, stock, list(stock.shards), lambda count: None)

    assert len(shards(client)) == 1 and not set(stock.shards) & {name.rsplit("/", 1)[1] for name in shards(client)}
    assert is_all_there(machine("two"), range(COUNT)) and is_all_there(place, range(COUNT))


def test_a_start_deletes_copies_of_another_size(machine):
    fill(machine(), range(COUNT))
    fill(machine(), range(COUNT, 2 * COUNT))
    short, whole = copies(machine())
    short.write_bytes(short.read_bytes()[:-1])

    Store(machine()).sweep()

    assert copies(machine()) == [whole]


def test_a_check_keeps_a_whole_copy_of_what_is_damaged_in_the_bucket(machine, client):
    fill(machine("one"), range(COUNT))
    [copy], [name] = copies(machine("one")), shards(client)
    client.put_object(Bucket=BUCKET, Key=name, Body=flipped(copy.read_bytes(), machine("one")))

    damaged, _ = check(machine("one"), take_stock(machine("one")), lambda count: None)

    assert {one.key for one in damaged} == {key(number) for number in range(COUNT)}
    assert copy.exists() and is_all_there(machine("one"), range(COUNT))


def test_what_is_damaged_in_the_bucket_too_is_said_to_be_damaged(machine, client):
    fill(machine("one"), range(COUNT))
    [copy], [name] = copies(machine("one")), shards(client)
    data = flipped(copy.read_bytes(), machine("one"))
    copy.write_bytes(data)
    client.put_object(Bucket=BUCKET, Key=name, Body=data)

    with pytest.raises(DamagedEntry):
        Store(machine("one")).get(key(0))


def test_a_fetched_copy_is_on_the_disk_before_it_has_its_name(machine, monkeypatch):
    fill(machine("one"), range(COUNT))
    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    replace_fsync(monkeypatch, lambda file: (done.append(f"fsync {os.fstat(file).st_size}"), real_sync(file))[1])
    monkeypatch.setattr(bucket_shelf.os, "replace", lambda old, new: (done.append("replace"), real_replace(old, new))[1])

    Store(machine("two")).get(key(0))
    wait_until(lambda: "replace" in done)

    assert done == [f"fsync {copies(machine('one'))[0].stat().st_size}", "replace"]
