"""Entries are whole, verified, and survive kills, full disks and each other."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from simpletuner.data.store import DamagedEntry, Store, WriteBehind, key_of
from simpletuner.errors import DatasetError, MemoryLimitError

KEY = key_of(name="an entry")


def tensors() -> dict[str, torch.Tensor]:
    return {"mean": torch.arange(6.0).reshape(1, 2, 3), "mask": torch.tensor([True, False])}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape and torch.equal(left[name], right[name]) for name in left
    )


def the_file(store: Store):
    [path] = store.folder.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_what_was_put_is_what_is_read(tmp_path, dtype, shape):
    put = {"value": torch.randn(shape).to(dtype)}

    Store(tmp_path).put(KEY, put, {"sample": "cats/ä.png"})

    assert same(Store(tmp_path).get(KEY), put)


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    batch = torch.randn(1000, 4, 8, 8)

    Store(tmp_path).put(KEY, {"mean": batch[3], "turned": batch[3].transpose(0, 2)}, {})

    assert the_file(Store(tmp_path)).stat().st_size < 2 * batch[3].nbytes + 2000
    assert torch.equal(Store(tmp_path).get(KEY)["turned"], batch[3].transpose(0, 2))


def test_a_key_depends_on_every_part_and_its_type_but_not_on_their_order():
    keys = {key_of(a="1", b="2"), key_of(a="1", b="3"), key_of(a=1, b="2"), key_of(a="1", c="2"), key_of(a="12", b="")}

    assert len(keys) == 5
    assert key_of(a="1", b="2") == key_of(b="2", a="1") == hashlib.blake2b(b'{"a":"1","b":"2"}', digest_size=16).hexdigest()


def test_an_absent_entry_is_a_key_error(tmp_path):
    with pytest.raises(KeyError):
        Store(tmp_path / "not there").get(KEY)


def test_keys_lists_what_has_says_and_remove_takes_away(tmp_path):
    store = Store(tmp_path)
    keys = {key_of(number=number) for number in range(40)}
    for key in keys:
        store.put(key, tensors(), {})

    store.remove(KEY)
    gone = keys.pop()
    store.remove(gone)

    assert store.keys() == keys
    assert store.has(min(keys)) and not store.has(gone)
    assert Store(tmp_path / "not there").keys() == set()


def test_no_changed_byte_goes_unnoticed(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, tensors(), {"sample": "cats/1.png"})
    path = the_file(store)
    whole = path.read_bytes()
    unnoticed = []

    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            assert same(store.get(KEY), tensors())
            unnoticed.append(whole[position : position + 1])
        except DamagedEntry:
            pass

    assert unnoticed == []


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_shortened_entry_is_damaged(tmp_path, kept):
    store = Store(tmp_path)
    store.put(KEY, tensors(), {})
    the_file(store).write_bytes(the_file(store).read_bytes()[:kept])

    with pytest.raises(DamagedEntry):
        store.get(KEY)


def test_an_entry_under_the_name_of_another_is_damaged(tmp_path):
    store, other = Store(tmp_path), key_of(name="another")
    store.put(KEY, tensors(), {})
    moved = tmp_path / other[:2] / f"{other}.safetensors"
    moved.parent.mkdir()
    the_file(store).rename(moved)

    with pytest.raises(DamagedEntry):
        store.get(other)


def test_a_damaged_entry_can_be_put_again(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, tensors(), {})
    the_file(store).write_bytes(b"")

    store.put(KEY, tensors(), {})

    assert same(store.get(KEY), tensors())


def test_files_say_nothing_of_where_they_lie(tmp_path):
    Store(tmp_path).put(KEY, tensors(), {"sample": "cats/1.png"})

    assert str(tmp_path).encode() not in the_file(Store(tmp_path)).read_bytes()


def test_what_a_killed_writer_left_is_no_entry_and_is_swept_once_it_is_old(tmp_path):
    store = Store(tmp_path)
    store.put(KEY, tensors(), {})
    left = tmp_path / KEY[:2] / f"{KEY}.123-abc.tmp"
    left.write_bytes(b"half")
    assert store.sweep() == 0 and left.exists()  # it may belong to a writer at work
    os.utime(left, (time.time() - 4000,) * 2)

    assert store.sweep() == 1

    assert not left.exists()
    assert store.keys() == {KEY}


def fill_the_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_names_the_folder_and_keeps_what_was_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(KEY, tensors(), {})

    with monkeypatch.context() as patch, pytest.raises(MemoryLimitError) as refused:
        fill_the_disk(patch)
        store.put(key_of(name="one too many"), tensors(), {})

    assert str(tmp_path) in refused.value.message and "its 1 finished" in refused.value.message
    assert same(store.get(KEY), tensors())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.safetensors"]


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
        for key in keys * 5:
            store.put(key, big, {})
            wrong.extend([] if same(store.get(key), big) else [key])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    assert wrong == []
    assert len(list(tmp_path.rglob("*.*"))) == len(keys)


def test_writing_behind_does_not_wait_for_the_disk_until_too_much_is_waiting(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    slow = Store(tmp_path)
    real_put = slow.put
    monkeypatch.setattr(slow, "put", lambda *entry: (may_go_on.wait(10), real_put(*entry)))

    with WriteBehind(ahead=2) as writer:
        for number in range(2):
            writer.put(slow, key_of(number=number), tensors(), {})
        assert slow.keys() == set()
        may_go_on.set()
        writer.put(slow, key_of(number=2), tensors(), {})

    assert len(slow.keys()) == 3


def test_an_error_of_the_writing_thread_reaches_the_caller(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)

    with pytest.raises(MemoryLimitError), WriteBehind(ahead=8) as writer:
        writer.put(Store(tmp_path), KEY, tensors(), {})


def test_an_error_of_the_caller_loses_nothing_that_was_handed_over(tmp_path):
    with pytest.raises(KeyboardInterrupt), WriteBehind(ahead=8) as writer:
        for number in range(5):
            writer.put(Store(tmp_path), key_of(number=number), tensors(), {})
        raise KeyboardInterrupt

    assert len(Store(tmp_path).keys()) == 5
