"""Headers first, bytes when they are read anyway: nothing is read twice, nothing is encoded for nothing, nothing stays unseen."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.contents import ContentBook, ImageReader, SetAside
from simpletuner.data.discover import Discovery, discover, take_up
from simpletuner.data.index import HEAD_BYTES
from simpletuner.data.latents import LatentCache
from simpletuner.data.store import Store
from simpletuner.errors import DatasetError
from simpletuner.types import Size
from tests.builders.shards import damage_entries

INDEX = Path("cache/index")


def large(seed: int, width: int = 128, height: int = 96) -> Image.Image:
    """A picture of noise, of which the file is longer than what the index reads of it."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def save_large(workplace):
    def write(name: str, seed: int = 0, **arguments) -> Path:
        path = workplace / "images" / name
        path.parent.mkdir(exist_ok=True)
        large(seed).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}), **arguments)
        assert path.stat().st_size > HEAD_BYTES
        return path

    return write


class Start:
    """One start of a run on the folder `images`: what it found, read and encoded."""

    def __init__(self, dataset, console) -> None:
        self.dataset, self.console = dataset, console
        self.encoded = 0
        self.read: list[str] = []
        self.look()

    def look(self) -> None:
        self.found: Discovery = discover(self.dataset, INDEX, 0, self.console)
        take_up(self.dataset, INDEX, 0)
        self.book = ContentBook(INDEX)
        start = self

        class Counting(LocalBackend):
            def read(self, name: str) -> bytes:
                start.read.append(name)
                return super().read(name)

        self.images = ImageReader({"set": Counting(self.dataset.options)}, self.book)
        self.latents = LatentCache(Store(Path("latents")), self.encode, "vae", self.images, 2, warn=pytest.fail)

    def encode(self, pixels):
        self.encoded += len(pixels)
        return {"mean": pixels[:, :, ::8, ::8].clone(), "std": torch.ones(len(pixels), 3, *pixels[0, 0, ::8, ::8].shape)}

    def fill(self) -> Start:
        self.latents.fill(self.found.samples)
        return self


@pytest.fixture
def start(dataset_of, console):
    return lambda **keys: Start(dataset_of(**keys), console)


def test_a_cold_start_reads_no_image_whole_and_a_filled_one_knows_all_contents(save_large, start, monkeypatch):
    for number in range(4):
        save_large(f"{number}.png", number)
    with monkeypatch.context() as patch:
        patch.setattr(LocalBackend, "read", lambda self, name: pytest.fail(f"{name} was read whole"))
        cold = start()
    assert [sample.content for sample in cold.found.samples] == [""] * 4

    cold.fill()

    with monkeypatch.context() as patch:
        patch.setattr(LocalBackend, "read", lambda self, name: pytest.fail(f"{name} was read whole"))
        patch.setattr(LocalBackend, "read_head", lambda self, name, count: pytest.fail(f"{name} was opened"))
        warm = start().fill()
    assert len({sample.content for sample in warm.found.samples}) == 4
    assert (cold.encoded, warm.encoded) == (4, 0)
    assert str(warm.found.changes) == "nothing changed"


def test_a_touched_file_is_read_again_and_not_encoded(save_large, start):
    paths = [save_large(f"{number}.png", number) for number in range(3)]
    start().fill()
    os.utime(paths[1], ns=(1, 1))

    touched = start().fill()

    assert str(touched.found.changes) == "1 touched"
    assert (touched.read, touched.encoded) == (["1.png"], 0)
    assert start().fill().read == []


def test_an_edited_image_is_the_only_one_encoded_and_so_are_added_ones(save_large, start):
    for number in range(4):
        save_large(f"{number}.png", number)
    start().fill()

    save_large("2.png", 99)
    edited = start().fill()
    for number in range(4, 7):
        save_large(f"{number}.png", number)
    added = start().fill()

    assert (str(edited.found.changes), edited.read) == ("1 changed", ["2.png"])
    assert str(added.found.changes) == "3 new"
    assert sorted(added.read) == ["4.png", "5.png", "6.png"]
    assert len(Store(Path("latents")).keys()) == 8


def test_an_edit_behind_the_first_bytes_that_keeps_the_size_is_noticed(save_large, start):
    path = save_large("a.bmp")
    start().fill()
    data = bytearray(path.read_bytes())
    data[-10] ^= 0xFF
    path.write_bytes(data)

    edited = start().fill()

    assert edited.read == ["a.bmp"]
    assert edited.encoded > 0


def test_copies_that_were_never_read_are_encoded_once(save_large, start):
    for name in ("a.png", "b.png", "c.png"):
        save_large(name, 1)

    first = start().fill()

    assert len(Store(Path("latents")).keys()) == 1
    assert first.encoded == 2  # a lone image is encoded as a pair
    assert start().fill().encoded == 0


@pytest.mark.parametrize(("name", "rule"), [("bad.jpg", "truncated"), ("bad.png", "broken")])
def test_damage_behind_the_header_is_found_once_skipped_and_remembered(save_large, start, name, rule, said):
    save_large("good.png")
    path = save_large(name, 1)
    data = bytearray(path.read_bytes())
    if rule == "truncated":
        data = data[: HEAD_BYTES + 100]
    else:
        data[-1000] ^= 0xFF
    path.write_bytes(data)
    cold = start()
    assert len(cold.found.samples) == 2  # the header is fine

    cold.fill()
    assert cold.book.has_set_aside
    cold.look()

    assert [sample.name for sample in cold.found.samples] == ["good.png"]
    assert cold.found.skipped == {rule: (name,)}
    assert any(name in note and rule in note for note in cold.found.notes)
    assert path.read_bytes() == data
    again = start().fill()
    assert (again.read, again.encoded, again.book.has_set_aside) == ([], 0, False)


def test_an_orientation_that_stands_behind_the_picture_is_found_when_it_is_read(save_large, start):
    path = save_large("late.png")
    data = path.read_bytes()
    body = b"eXIf" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    cold = start()
    assert str(cold.found.samples[0].geometry.original) == "128x96"

    cold.fill()
    assert (cold.book.has_set_aside, cold.encoded) == (True, 0)
    cold.look()
    cold.fill()

    assert str(cold.found.samples[0].geometry.original) == "96x128"
    assert (cold.book.has_set_aside, cold.encoded) == (False, 2)


def test_another_process_learns_what_this_one_read(save_large, start):
    for number in range(4):
        save_large(f"{number}.png", number)
    one, other = start(), start()

    one.latents.fill(one.found.samples[:2])
    other.latents.fill(other.found.samples[2:])
    one.book.catch_up(one.found.samples)

    assert all(one.book.content(sample) for sample in one.found.samples)
    assert one.latents.missing(one.found.samples) == []


def test_an_image_that_changes_during_a_run_is_refused(save_large, start):
    save_large("a.png", 1)
    running = start().fill()
    save_large("a.png", 2)

    with pytest.raises(DatasetError, match=r"set/a.png was changed since the run began"):
        running.images.open(running.found.samples[0])


def test_on_demand_a_damaged_image_is_said_once_and_left_out(save_large, start):
    save_large("good.png")
    path = save_large("bad.jpg", 1)
    path.write_bytes(path.read_bytes()[: HEAD_BYTES + 100])
    lazy, said = start(), []
    latents = LatentCache(Store(Path("latents")), lazy.encode, "vae", lazy.images, 2, warn=said.append, is_ondemand=True)

    rows = [latents.read_batch(lazy.found.samples) for _ in range(2)]

    assert [[row is None for row in batch] for batch in rows] == [[True, False]] * 2
    assert said == ["set/bad.jpg is skipped, truncated: the file ends before the picture does"]
    lazy.images.save()
    assert start().found.skipped == {"truncated": ("bad.jpg",)}


def test_on_demand_what_is_there_is_not_encoded_when_the_index_was_lost(save_large, start):
    save_large("a.png")
    start().fill()
    (INDEX / "set.sqlite").unlink()
    lazy = start()
    latents = LatentCache(Store(Path("latents")), lazy.encode, "vae", lazy.images, 2, warn=pytest.fail, is_ondemand=True)

    [row] = latents.read_batch(lazy.found.samples)

    assert row is not None and lazy.encoded == 0


def test_on_demand_a_damaged_entry_of_an_image_that_was_never_read_is_made_again(save_large, start):
    save_large("a.png")
    save_large("b.png", 1)
    start().fill()
    (INDEX / "set.sqlite").unlink()
    damage_entries(Path("latents"))
    lazy, said = start(), []
    latents = LatentCache(Store(Path("latents")), lazy.encode, "vae", lazy.images, 2, warn=said.append, is_ondemand=True)

    rows = latents.read_batch(lazy.found.samples)

    assert all(row is not None for row in rows) and lazy.encoded == 2
    assert len(said) == 2 and all("is damaged and made again" in line for line in said)


def test_a_place_that_knows_sizes_is_not_read_at_all_until_latents_are_made(save_large, dataset_of, console, monkeypatch):
    save_large("a.png")
    listed = LocalBackend.list
    monkeypatch.setattr(LocalBackend, "list", lambda self: (replace(entry, size=Size(128, 96)) for entry in listed(self)))
    monkeypatch.setattr(LocalBackend, "read_head", lambda self, name, count: pytest.fail(f"{name} was opened"))

    first = Start(dataset_of(), console).fill()

    assert (str(first.found.samples[0].geometry.original), first.encoded) == ("128x96", 2)
    assert first.found.samples[0].fingerprint


def test_a_wrong_size_in_a_table_is_mended_when_the_image_is_read(save_large, dataset_of, console, monkeypatch):
    save_large("a.png")
    listed = LocalBackend.list
    monkeypatch.setattr(LocalBackend, "list", lambda self: (replace(entry, size=Size(500, 500)) for entry in listed(self)))
    wrong = Start(dataset_of(), console)

    wrong.fill()
    wrong.look()

    assert str(wrong.found.samples[0].geometry.original) == "128x96"


def test_an_image_set_aside_stays_so_for_the_run(save_large, start):
    path = save_large("bad.jpg", 1)
    path.write_bytes(path.read_bytes()[: HEAD_BYTES + 100])
    run = start()

    for _ in range(2):
        with pytest.raises(SetAside, match="truncated"):
            run.images.open(run.found.samples[0])

    assert run.read == ["bad.jpg"]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".tif"])
@pytest.mark.parametrize("turn", [1, 6])
def test_the_first_look_and_the_whole_file_say_the_same(workplace, start, suffix, turn):
    (workplace / "images").mkdir()
    tags = Image.Exif()
    tags[274] = turn
    arguments = {"exif": tags} if suffix in (".jpg", ".png", ".webp", ".tif") and turn != 1 else {}
    large(3, 200, 150).save(workplace / f"images/a{suffix}", **({"lossless": True} if suffix == ".webp" else {}), **arguments)

    cold = start().fill()

    assert not cold.book.has_set_aside
    assert str(cold.found.samples[0].geometry.original) == ("150x200" if arguments else "200x150")


def test_a_long_preview_before_the_header_is_read_past(workplace, start):
    (workplace / "images").mkdir()
    buffer = io.BytesIO()
    large(0).save(buffer, "JPEG", quality=100)
    data = buffer.getvalue()
    preview = b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(59_998)
    (workplace / "images/a.jpg").write_bytes(data[:2] + preview + data[2:])

    assert str(start().fill().found.samples[0].geometry.original) == "128x96"
