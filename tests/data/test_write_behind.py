"""Entries are written while the caller goes on, and every error reaches it."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from simpletuner.data.store import Store, key_of
from simpletuner.data.write_behind import WriteBehind
from simpletuner.errors import MemoryLimitError
from tests.builders.shards import shards_in
from tests.builders.syncs import replace_fsync


def tensors() -> dict[str, torch.Tensor]:
    return {"mean": torch.arange(6.0)}


def fill_the_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replace_fsync(monkeypatch, fsync)


def test_it_does_not_wait_for_the_disk_until_too_much_is_waiting(tmp_path, monkeypatch):
    may_go_on, blocked = threading.Event(), threading.Event()
    slow = Store(tmp_path)
    real = slow.put_many
    monkeypatch.setattr(slow, "put_many", lambda entries: (may_go_on.wait(10), real(entries)))

    with WriteBehind(ahead=2) as writer:
        for number in range(2):
            writer.put(slow, key_of(number=number), tensors(), {})
        assert slow.keys() == set()
        third = threading.Thread(target=lambda: (writer.put(slow, key_of(number=2), tensors(), {}), blocked.set()))
        third.start()
        assert not blocked.wait(0.2)
        may_go_on.set()
        third.join()

    assert len(slow.keys()) == 3


def test_what_waits_is_written_together_and_sealed_at_the_end(tmp_path, monkeypatch):
    syncs: list[int] = []
    real = os.fsync
    replace_fsync(monkeypatch, lambda descriptor: (syncs.append(descriptor), real(descriptor)))
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")

    with WriteBehind(ahead=100) as writer:
        for number in range(100):
            writer.put((one, two)[number % 2], key_of(number=number), tensors(), {})

    assert len(syncs) < 60
    assert [len(Store(tmp_path / name).keys()) for name in ("one", "two")] == [50, 50]
    assert [path.suffix for path in shards_in(tmp_path)] == [".safetensors"] * 2


def test_an_error_of_the_writing_thread_reaches_the_caller(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)

    with pytest.raises(MemoryLimitError), WriteBehind(ahead=8) as writer:
        writer.put(Store(tmp_path), key_of(number=0), tensors(), {})


def test_a_caller_that_goes_on_putting_hears_of_the_error(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)
    store, put = Store(tmp_path), 0

    with pytest.raises(MemoryLimitError), WriteBehind(ahead=2) as writer:
        for put in range(1000):
            writer.put(store, key_of(number=put), tensors(), {})

    assert put < 10


def test_an_error_of_the_caller_loses_nothing_that_was_handed_over(tmp_path):
    with pytest.raises(KeyboardInterrupt), WriteBehind(ahead=8) as writer:
        for number in range(5):
            writer.put(Store(tmp_path), key_of(number=number), tensors(), {})
        raise KeyboardInterrupt

    assert len(Store(tmp_path).keys()) == 5
