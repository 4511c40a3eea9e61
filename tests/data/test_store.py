"""Entries are whole, verified, and survive kills, full disks and each other."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from simpletuner.data import shard_writer
from simpletuner.data.store import DamagedEntry, Store, key_of
from simpletuner.errors import DatasetError, MemoryLimitError
from tests.builders.shards import damage_entries, filled, flip, places_in, readable, same, shards_in, tensors
from tests.builders.syncs import replace_fsync

KEY = key_of(name="an entry")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_what_was_put_is_what_is_read(tmp_path, dtype, shape):
    put = {"value": torch.randn(shape).to(dtype), "odd": torch.tensor([True]), "empty": torch.empty(2, 0)}

    Store(tmp_path).put(KEY, put, {"sample": "cats/ä.png"})

    assert same(Store(tmp_path).get(KEY), put)


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    batch = torch.randn(1000, 4, 8, 8)

    Store(tmp_path).put(KEY, {"mean": batch[3], "turned": batch[3].transpose(0, 2)}, {})

    assert shards_in(tmp_path)[0].stat().st_size < shard_writer.HEADER_BYTES + 2 * batch[3].nbytes + 2000
    assert torch.equal(Store(tmp_path).get(KEY)["turned"], batch[3].transpose(0, 2))


def test_a_key_depends_on_every_part_and_its_type_but_not_on_their_order():
    keys = {key_of(a="1", b="2"), key_of(a="1", b="3"), key_of(a=1, b="2"), key_of(a="1", c="2"), key_of(a="12", b="")}

    assert len(keys) == 5
    assert key_of(a="1", b="2") == key_of(b="2", a="1") == hashlib.blake2b(b'{"a":"1","b":"2"}', digest_size=16).hexdigest()


def test_the_use_of_a_shard_is_noted_again_when_a_day_has_passed(tmp_path, monkeypatch):
    [key] = filled(tmp_path, 1)
    [path] = shards_in(tmp_path)
    store, day = Store(tmp_path), 86400
    clock = time.monotonic()
    noted = []
    for hours in (0, 23, 25, 26):
        monkeypatch.setattr(time, "monotonic", lambda at=clock + hours * 3600: at)
        os.utime(path, (1e9, 1e9))
        store.get(key)
        noted.append(path.stat().st_mtime > time.time() - day)

    assert noted == [True, False, True, False]


def test_an_absent_entry_is_a_key_error(tmp_path):
    with pytest.raises(KeyError):
        Store(tmp_path / "not there").get(KEY)


@pytest.mark.parametrize("is_sealed", [False, True], ids=["growing", "sealed"])
def test_keys_lists_what_has_says_and_remove_takes_away(tmp_path, is_sealed):
    store = Store(tmp_path)
    keys = {key_of(number=number) for number in range(40)}
    for key in keys:
        store.put(key, tensors(), {})
    if is_sealed:
        store.close()

    store.remove(KEY)
    gone = keys.pop()
    store.remove(gone)

    for seen in (store, Store(tmp_path)):
        assert seen.keys() == keys
        assert seen.has(min(keys)) and not seen.has(gone)
        with pytest.raises(KeyError):
            seen.get(gone)
    assert Store(tmp_path / "not there").keys() == set()


@pytest.mark.parametrize("is_sealed", [False, True], ids=["growing", "sealed"])
def test_an_entry_that_was_removed_can_be_put_again(tmp_path, is_sealed):
    store = Store(tmp_path)
    store.put(KEY, tensors(1), {})
    if is_sealed:
        store.close()
    store.remove(KEY)

    store.put(KEY, tensors(2), {})

    assert same(store.get(KEY), tensors(2))
    assert same(Store(tmp_path).get(KEY), tensors(2))


def test_the_newest_of_two_entries_with_one_key_counts(tmp_path):
    store = Store(tmp_path)
    for number in range(3):
        store.put(KEY, tensors(number), {})
    assert same(store.get(KEY), tensors(2)) and same(Store(tmp_path).get(KEY), tensors(2))
    store.close()
    assert same(Store(tmp_path).get(KEY), tensors(2))

    store.put(KEY, tensors(7), {})

    assert same(Store(tmp_path).get(KEY), tensors(7)) and store.keys() == {KEY}


@pytest.mark.parametrize("is_sealed", [False, True], ids=["growing", "sealed"])
def test_no_changed_byte_goes_unnoticed_or_harms_another_entry(tmp_path, is_sealed):
    keys = filled(tmp_path, 4)
    [path] = shards_in(tmp_path)
    if not is_sealed:
        path = path.rename(path.with_suffix(".open"))
    places = places_in(path)
    size = path.stat().st_size
    first = min(place.offset for place in places.values())
    positions = [*range(12), *range(first - 12, size)]

    for position in positions:
        flip(path, position)
        lost = {0, 1, 2, 3} - readable(tmp_path, keys)
        flip(path, position)

        hit = {number for number, key in enumerate(keys) if places[key].offset <= position < places[key].offset + places[key].length}
        assert lost == hit, position
        assert readable(tmp_path, keys) == {0, 1, 2, 3}


@pytest.mark.parametrize("is_sealed", [False, True], ids=["growing", "sealed"])
def test_a_shortened_file_keeps_every_entry_that_is_whole(tmp_path, is_sealed):
    keys = filled(tmp_path, 5)
    [path] = shards_in(tmp_path)
    if not is_sealed:
        path = path.rename(path.with_suffix(".open"))
    places = places_in(path)
    whole = path.read_bytes()

    for kept in (0, 7, 100, places[keys[0]].offset, *range(places[keys[2]].offset + 1, len(whole), 29)):
        path.write_bytes(whole[:kept])

        assert readable(tmp_path, keys) == {number for number, key in enumerate(keys) if places[key].offset + places[key].length <= kept}


def test_a_damaged_entry_says_so_and_can_be_put_again(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, tensors(), {})
    assert damage_entries(tmp_path) == 1
    with pytest.raises(DamagedEntry, match="checksum"):
        store.get(KEY)

    store.put(KEY, tensors(), {})

    assert same(store.get(KEY), tensors()) and same(Store(tmp_path).get(KEY), tensors())


def test_an_entry_of_a_file_that_is_gone_is_a_key_error(tmp_path):
    keys = filled(tmp_path, 2)
    store = Store(tmp_path)
    assert same(store.get(keys[0]), tensors(0))
    shards_in(tmp_path)[0].unlink()

    with pytest.raises(KeyError):
        store.get(keys[0])


def test_entries_of_other_processes_are_found_when_they_are_asked_for(tmp_path):
    mine, theirs = Store(tmp_path), Store(tmp_path)
    assert mine.keys() == set()

    theirs.put(KEY, tensors(), {})
    assert same(mine.get(KEY), tensors())
    theirs.close()  # the file has another name now

    assert same(mine.get(KEY), tensors())
    assert mine.keys() == {KEY}


def test_files_say_nothing_of_where_they_lie(tmp_path):
    filled(tmp_path, 3)

    assert all(str(tmp_path).encode() not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may write everywhere")
def test_a_folder_that_one_may_only_read_can_be_read(tmp_path):
    keys = filled(tmp_path, 3)
    tmp_path.chmod(0o500)
    try:
        assert readable(tmp_path, keys) == {0, 1, 2} and Store(tmp_path).sweep(0) == 0
        with pytest.raises(DatasetError, match="cannot be used"):
            Store(tmp_path).put(KEY, tensors(), {})
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_that_fails_while_it_syncs_names_the_folder_and_keeps_what_was_written(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Store(tmp_path)
    store.put(KEY, tensors(), {})

    with monkeypatch.context() as patch, pytest.raises(MemoryLimitError) as refused:
        replace_fsync(patch, fsync)
        store.put(key_of(name="one too many"), tensors(), {})

    assert str(tmp_path) in refused.value.message and "its 1 finished" in refused.value.message
    assert store.keys() == Store(tmp_path).keys() == {KEY}
    store.put(key_of(name="later"), tensors(), {})
    assert len(Store(tmp_path).keys()) == 2


@pytest.mark.parametrize("name", ["cache", "cache/vae"])
def test_a_folder_that_cannot_be_is_refused_by_name(tmp_path, name):
    (tmp_path / "cache").write_text("a file")
    store = Store(tmp_path / name)
    assert store.keys() == set() and not store.has(KEY)

    with pytest.raises(DatasetError, match=f"{name} cannot be used"):
        store.put(KEY, tensors(), {})


def test_writers_and_readers_of_one_key_never_see_half_an_entry(tmp_path):
    keys = [key_of(number=number) for number in range(5)]
    big = {"mean": torch.randn(64, 32, 32)}
    wrong = []

    def work(_: int) -> None:
        store = Store(tmp_path)
        for key in keys * 3:
            store.put(key, big, {})
            wrong.extend([] if same(store.get(key), big) else [key])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    assert wrong == []
    assert Store(tmp_path).keys() == set(keys)


def test_one_store_may_be_used_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", shard_writer.HEADER_BYTES + 20_000)
    store = Store(tmp_path)

    def work(worker: int) -> None:
        for number in range(40):
            key = key_of(worker=worker, number=number)
            store.put(key, tensors(number), {})
            assert same(store.get(key), tensors(number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))

    assert len(store.keys()) == len(Store(tmp_path).keys()) == 240
    assert len(shards_in(tmp_path)) > 2
