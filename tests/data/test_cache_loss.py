"""Counting the entries that went with what is damaged in finished shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from simpletuner.data.cache_loss import lost_entries
from simpletuner.data.cache_tools import check, rewrite, take_stock
from simpletuner.data.shards import TRAILER
from simpletuner.data.store import Store, key_of
from tests.builders.shards import flip, places_in, shards_in

COUNT = 12


def key(number: int) -> str:
    return key_of(number=number)


def fill(folder: Path, numbers: range) -> Path:
    """One sealed shard."""
    before = set(shards_in(folder)) if folder.exists() else set()
    store = Store(folder)
    store.put_many((key(number), {"mean": torch.full((300,), float(number))}, {"sample": f"cats/{number}.png"}) for number in numbers)
    store.close()
    [path] = set(shards_in(folder)) - before
    return path


def lose(path: Path, *numbers: int) -> None:
    """Damage the heads of some entries and the index."""
    places = places_in(path)
    for number in numbers:
        flip(path, places[key(number)].offset + 20)
    flip(path, path.stat().st_size - TRAILER.size - 40)


def lost(folder: Path) -> list[int | None]:
    return list(lost_entries(folder, take_stock(folder)).values())


@pytest.mark.parametrize(
    ("length", "count"),
    [(lambda size: size // 2, COUNT), (lambda size: size - 1, 0), (lambda size: size - TRAILER.size - 40 * COUNT - 900, 1), (lambda size: 0, None)],
    ids=["half of it", "but a byte", "but the index and an entry", "nothing"],
)
def test_of_a_shard_that_was_cut_the_entries_behind_the_cut_are_lost(tmp_path, length, count):
    path = fill(tmp_path, range(COUNT))
    os.truncate(path, length(path.stat().st_size))

    assert lost(tmp_path) == ([] if count == 0 else [count])


def test_entries_whose_heads_went_with_the_index_are_counted(tmp_path):
    fill(tmp_path, range(100, 103))
    path = fill(tmp_path, range(COUNT))
    assert lost(tmp_path) == []
    lose(path, 3, 7, 8)

    assert lost(tmp_path) == [3]


def test_the_last_bytes_tell_how_many_if_the_header_is_gone_too(tmp_path):
    path = fill(tmp_path, range(COUNT))
    lose(path, 3, 7)
    flip(path, 8)
    assert lost(tmp_path) == [2]
    flip(path, path.stat().st_size - TRAILER.size)

    assert lost(tmp_path) == [None]


def test_what_lies_elsewhere_too_or_was_removed_is_not_lost(tmp_path):
    path = fill(tmp_path, range(COUNT))
    Store(tmp_path).remove(key(5))
    lose(path, 3, 4, 5)
    fill(tmp_path, range(3, 4))

    assert lost(tmp_path) == [1]


def test_damage_that_the_index_leads_to_is_no_loss_of_its_own(tmp_path):
    path = fill(tmp_path, range(COUNT))
    flip(path, places_in(path)[key(3)].offset + 20)

    damaged, _ = check(tmp_path, take_stock(tmp_path), lambda count: None)

    assert [one.key for one in damaged] == [key(3)] and lost(tmp_path) == []


def test_a_misspelled_key_in_the_header_is_no_loss(tmp_path):
    path = fill(tmp_path, range(COUNT))
    lose(path)
    header = path.read_bytes()[:4096]
    position = header.index(f"{key(4)}/~".encode())
    flip(path, position)

    assert lost(tmp_path) == []


def test_rewriting_keeps_what_is_whole_and_ends_the_matter(tmp_path):
    path = fill(tmp_path, range(COUNT))
    lose(path, 3)

    rewrite(tmp_path, take_stock(tmp_path), [path.name], lambda count: None)

    assert lost(tmp_path) == [] and take_stock(tmp_path).faults == {}
    assert Store(tmp_path).keys() == {key(number) for number in range(COUNT) if number != 3}
