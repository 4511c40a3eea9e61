from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.data.discover import Discovery, discover, take_up
from simpletuner.data.images import read_pixels
from simpletuner.errors import DatasetError
from simpletuner.types import Size


@pytest.fixture
def found(dataset_of, console):
    """Discover the folder `images` with some keys, as each start would."""

    def run(seed: int = 42, **keys) -> Discovery:
        found = discover(dataset_of(**keys), Path("cache/index"), seed, console)
        take_up(dataset_of(**keys), Path("cache/index"), seed)  # as a run does that trains on it
        return found

    return run


def names(discovery: Discovery) -> list[str]:
    return [sample.name for sample in discovery.samples]


def test_samples_are_sorted_and_complete(save, found):
    save("b_c.png", 100, 60)
    save("a/x_y.jpg", 60, 100, seed=1)

    discovery = found(is_regularisation_data=True)

    assert names(discovery) == ["a/x_y.jpg", "b_c.png"]
    first, second = discovery.samples
    assert (first.id, first.captions, first.is_regularisation) == ("set/a/x_y.jpg", ("x y",), True)
    assert (str(first.geometry.original), str(first.geometry.bucket), str(second.geometry.bucket)) == ("60x100", "24x40", "40x24")
    assert len(first.content) == len(second.content) == 32 and first.content != second.content
    assert str(discovery.changes) == "2 new"
    assert discovery.skipped == {}


def test_every_kind_of_image_is_kept_or_skipped_by_a_stated_rule(save, found, workplace, picture):
    folder = workplace / "images"
    tags = Image.Exif()
    tags[274] = 6
    save("plain.png")
    save("rotated.jpg", 48, 32, exif=tags)
    picture().convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40).save(folder / "sixteen.png")
    picture().save(folder / "animated.gif", save_all=True, append_images=[picture(seed=1)])
    picture().convert("RGBA").save(folder / "alpha.png")
    picture().convert("P").save(folder / "palette.png")
    save("tiny.png", 8, 8)
    (folder / "empty.png").write_bytes(b"")
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "cut.jpg").write_bytes(save("whole.jpg").read_bytes()[:-50])
    (folder / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic")
    bomb = io.BytesIO()
    Image.new("1", (8, 8)).save(bomb, "BMP")
    (folder / "bomb.bmp").write_bytes(bomb.getvalue()[:18] + (20000).to_bytes(4, "little") * 2 + bomb.getvalue()[26:])
    (folder / "link.png").symlink_to(os.devnull)
    (folder / "notes.txt").write_text("no image", encoding="utf-8")

    discovery = found(minimum_image_size=16)

    assert names(discovery) == ["alpha.png", "animated.gif", "cmyk.jpg", "palette.png", "plain.png", "rotated.jpg", "sixteen.png", "whole.jpg"]
    assert discovery.skipped == {
        "zero-byte": ("empty.png",),
        "broken": ("broken.png",),
        "truncated": ("cut.jpg",),
        "unsupported": ("phone.heic",),
        "huge": ("bomb.bmp",),
        "outside": ("link.png",),
        "too small": ("tiny.png",),
    }
    for trait in ("rotated", "CMYK", "16-bit", "animated", "alpha"):
        assert [note for note in discovery.notes if note.startswith(f"dataset 'set': 1 {trait}: ")], trait
    assert "dataset 'set': 1 (cut.jpg) skipped, truncated: the file ends before the picture does" in discovery.notes
    for sample in discovery.samples:
        pixels = read_pixels((folder / sample.name).read_bytes(), sample.geometry, sample.id)
        assert tuple(pixels.shape) == (3, sample.geometry.bucket.height, sample.geometry.bucket.width)


def test_a_second_start_finds_the_same_and_says_nothing(save, found, said):
    for number in range(3):
        save(f"{number}.png", seed=number)
    first = found()
    printed = said.getvalue()

    second = found()

    assert second.samples == first.samples
    assert str(second.changes) == "nothing changed"
    assert said.getvalue() == printed != ""


def test_caption_files_that_the_strategy_does_not_read_are_said(save, found, workplace):
    save("a.png")
    save("b.png", seed=1)
    (workplace / "images" / "a.txt").write_text("a cat")

    assert "dataset 'set': 1 (a.png) have a .txt that is not read: caption_strategy is filename, not textfile" in found().notes


def test_the_users_folder_is_left_alone(save, found, workplace):
    save("a.png")

    found()

    assert os.listdir(workplace / "images") == ["a.png"]
    assert (workplace / "cache/index/set.sqlite").is_file()


def test_an_edited_image_is_a_changed_sample(save, found):
    save("a.png")
    before = found().samples[0]

    save("a.png", 64, 64, seed=5)
    discovery = found()

    assert str(discovery.changes) == "1 changed"
    assert discovery.samples[0].content != before.content
    assert discovery.samples[0].geometry.original == Size(64, 64)


def test_a_changed_rule_takes_effect_though_no_image_changed(save, found):
    save("a.png", 200, 100)

    assert str(found(resolution=32).samples[0].geometry.bucket) == "48x24"
    assert str(found(resolution=64).samples[0].geometry.bucket) == "88x48"
    assert str(found(resolution=64, crop=True).samples[0].geometry.bucket) == "64x64"


def test_a_random_crop_is_a_function_of_seed_and_sample(save, found):
    for number in range(8):
        save(f"{number}.png", 200, 32)

    def lefts(seed: int) -> dict[str, int]:
        return {sample.name: sample.geometry.crop.left for sample in found(seed, crop=True, crop_style="random").samples}

    once = lefts(1)
    assert lefts(1) == once != lefts(2)
    assert len(set(once.values())) > 4
    save("3.png", 200, 32, seed=1)
    assert lefts(1) == once


def test_captions_come_from_text_files(save, found, workplace):
    for name in ("a", "b", "c"):
        save(f"{name}.png")
    (workplace / "images/a.txt").write_bytes("\ufeffa cat\r\nthe cat\r\n".encode())
    (workplace / "images/b.txt").write_bytes("schöner Hund".encode("latin-1"))
    (workplace / "images/c.txt").write_bytes(b"\n")

    discovery = found(caption_strategy="textfile")

    assert [sample.captions for sample in discovery.samples] == [("a cat", "the cat"), ("schöner Hund",), ("",)]
    assert "dataset 'set': 1 (b.txt) not UTF-8: read as latin-1" in discovery.notes
    assert "dataset 'set': 1 (c.txt) empty: trained without words of their own" in discovery.notes
    assert str(discovery.caption_changes) == "3 new"


def test_an_edited_caption_is_seen(save, found, workplace):
    for name in ("a", "b"):
        save(f"{name}.png")
        (workplace / f"images/{name}.txt").write_text(name, encoding="utf-8")
    found(caption_strategy="textfile")

    (workplace / "images/a.txt").write_text("another", encoding="utf-8")
    discovery = found(caption_strategy="textfile")

    assert [sample.captions for sample in discovery.samples] == [("another",), ("b",)]
    assert (str(discovery.changes), str(discovery.caption_changes)) == ("nothing changed", "1 changed")


def test_an_image_without_its_caption_file_is_skipped_and_counted(save, found, workplace):
    save("a.png")
    save("b.png")
    (workplace / "images/a.txt").write_text("a cat", encoding="utf-8")

    discovery = found(caption_strategy="textfile")

    assert names(discovery) == ["a.png"]
    assert discovery.skipped == {"no caption": ("b.png",)}


def test_no_caption_at_all_is_an_error_with_a_hint(save, found):
    save("a.png")

    with pytest.raises(DatasetError, match=r"the only image in images cannot be used") as caught:
        found(caption_strategy="textfile")

    assert caught.value.exit_code == 3
    assert "caption_strategy to filename or instanceprompt" in str(caught.value.hint)


def test_an_empty_folder_is_an_error(found, workplace):
    with pytest.raises(DatasetError, match=r"dataset 'set': images is empty"):
        found()

    (workplace / "images/film.mp4").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"images holds no images, only other files \(1 .mp4\)"):
        found()


def test_when_nothing_is_left_each_rule_says_how_many_it_took(save, found, workplace):
    for number in range(4):
        save(f"{number}.png", 8, 8, seed=number)
    (workplace / "images/empty.png").write_bytes(b"")

    with pytest.raises(DatasetError) as caught:
        found(minimum_image_size=16)

    assert "none of the 5 images in images can be used" in caught.value.message
    assert "1 (empty.png) skipped, zero-byte: the file is empty" in caught.value.message
    assert "4 (0.png, 1.png, 2.png, ...) skipped, too small: under minimum_image_size" in caught.value.message
    assert caught.value.hint == "Lower minimum_image_size, or set it to 0 to keep them all."


def test_enlarged_images_are_counted(save, found):
    save("small.png", 16, 16)
    save("large.png", 64, 64)

    notes = found(resolution=32).notes

    assert notes == ("dataset 'set': 1 enlarged: smaller than their training picture (minimum_image_size leaves such images out)",)


def test_a_subset_is_the_same_each_time_and_mostly_when_images_are_added(save, found):
    for number in range(20):
        save(f"{number:02}.png", 8, 8, seed=number)
    chosen = set(names(found(max_num_samples=8)))

    assert len(chosen) == 8
    assert set(names(found(seed=7, max_num_samples=8))) == chosen
    save("new.png", 8, 8)
    assert len(chosen & set(names(found(max_num_samples=8)))) >= 7
    assert len(found(max_num_samples=8).skipped["not drawn"]) == 13
