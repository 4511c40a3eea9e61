"""Pictures cut around faces: found by the real cascade, looked for once, kept in the index."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.data import extras
from simpletuner.data.backends.local import LocalBackend, LocalOptions
from simpletuner.data.contents import ContentBook, ImageReader, SetAside
from simpletuner.data.discover import discover, take_up
from simpletuner.data.faces import FaceFinder
from simpletuner.data.index import HEAD_BYTES
from simpletuner.errors import ConfigError
from simpletuner.types import Crop, Geometry, Size
from tests.builders.portrait import portrait

FACE = {"crop": True, "crop_style": "face", "caption_strategy": "filename", "resolution": 128}


def encoded(image: Image.Image, kind: str = "PNG", **arguments) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def turned(image: Image.Image) -> bytes:
    """A JPEG as a camera held upright saves it: lying on its side, with a note to turn it."""
    exif = Image.Exif()
    exif[274] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_tail(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with chunks behind its picture, out of reach of what the index reads of it."""
    return b"".join([data[:-12], chunk(b"prVt", bytes(HEAD_BYTES)), *chunks, data[-12:]])


def middle(data: bytes) -> tuple[float, float]:
    face = FaceFinder().find(data, "a picture")
    assert face is not None
    return face.left + face.width / 2, face.top + face.height / 2


@pytest.fixture
def keep(workplace):
    """Save a picture into the dataset's folder."""

    def write(name: str, image: Image.Image, **arguments) -> Path:
        path = workplace / "images" / name
        path.parent.mkdir(exist_ok=True)
        image.save(path, **arguments)
        return path

    return write


@pytest.fixture
def found(dataset_of, console):
    def look(**keys):
        dataset = dataset_of(**{**FACE, **keys})
        found = discover(dataset, Path("cache/index"), 0, console)
        take_up(dataset, Path("cache/index"), 0)
        return found

    return look


@pytest.fixture
def nothing_is_read(monkeypatch):
    monkeypatch.setattr(LocalBackend, "read", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(FaceFinder, "find", lambda self, data, name: pytest.fail(f"{name} was searched"))


@pytest.mark.parametrize(
    "data",
    [
        encoded(portrait(640, 480, (200, 220, 150))),
        encoded(portrait(640, 480, (200, 220, 150)), "JPEG"),
        turned(portrait(640, 480, (200, 220, 150))),
    ],
    ids=["png", "jpeg", "turned"],
)
def test_a_face_is_found_where_it_is_in_the_upright_image(data):
    assert middle(data) == pytest.approx((200, 220), abs=15)


def test_a_face_in_a_large_image_is_told_in_the_pixels_of_that():
    assert middle(encoded(portrait(3000, 2000, (2200, 900, 600)), "JPEG")) == pytest.approx((2200, 900), abs=60)


def test_of_several_faces_the_largest_counts():
    assert middle(encoded(portrait(640, 480, (120, 240, 90), (450, 240, 180)))) == pytest.approx((450, 240), abs=15)


def test_where_no_face_is_none_is_found():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)

    assert FaceFinder().find(encoded(portrait(640, 480)), "plain") is None
    assert FaceFinder().find(encoded(Image.fromarray(noise)), "noise") is None
    assert FaceFinder().find(encoded(portrait(3, 2)), "tiny") is None


def test_many_threads_find_what_one_does():
    pictures = [encoded(portrait(320, 240, (60 + 10 * number, 120, 120)), "JPEG") for number in range(12)]
    finder = FaceFinder()

    with ThreadPoolExecutor(4) as pool:
        side_by_side = list(pool.map(lambda data: finder.find(data, "x"), pictures))

    assert side_by_side == [finder.find(data, "x") for data in pictures]
    assert None not in side_by_side


def test_the_window_follows_the_face_and_the_bucket_follows_the_header(keep, found, workplace):
    keep("left.png", portrait(640, 320, (130, 160, 150)))
    keep("right.png", portrait(640, 320, (510, 160, 150)))
    keep("middle.png", portrait(640, 320, (320, 160, 150)))

    geometry = {sample.name: sample.geometry for sample in found().samples}

    assert {one.resized for one in geometry.values()} == {Size(256, 128)}
    assert {one.bucket for one in geometry.values()} == {Size(128, 128)}
    assert geometry["left.png"].crop == Crop(0, 0, 128, 128) and geometry["right.png"].crop == Crop(128, 0, 128, 128)
    assert geometry["middle.png"].crop.left == pytest.approx(64, abs=6)


def test_a_second_start_reads_no_image_and_cuts_alike(keep, found, request):
    keep("face.png", portrait(640, 320, (420, 160, 150)))
    keep("none.png", portrait(640, 320))
    first = found()

    request.getfixturevalue("nothing_is_read")
    second = found()

    assert [sample.geometry for sample in second.samples] == [sample.geometry for sample in first.samples]
    assert second.faceless == first.faceless == ("none.png",)


def test_only_a_changed_image_is_searched_again_and_its_window_moves(keep, found, monkeypatch):
    keep("a.png", portrait(640, 320, (420, 160, 150)))
    path = keep("b.png", portrait(640, 320, (420, 160, 150)))
    found()
    searched: list[str] = []
    monkeypatch.setattr(FaceFinder, "find", lambda self, data, name, find=FaceFinder.find: [searched.append(name), find(self, data, name)][1])

    keep("b.png", portrait(640, 320, (130, 160, 150)))
    os.utime(path, ns=(5, 5))
    samples = found().samples

    assert searched == ["b.png"]
    assert samples[1].geometry.crop.left == 0 < samples[0].geometry.crop.left


def test_images_without_a_face_are_cut_as_random_does_and_counted_once(keep, found):
    for number in range(4):
        keep(f"{number}.png", portrait(640, 320))
    keep("face.png", portrait(640, 320, (420, 160, 150)))

    by_face, at_random = found(), found(crop_style="random")

    assert by_face.samples[:4] == at_random.samples[:4]
    assert by_face.faceless == tuple(f"{number}.png" for number in range(4))
    assert by_face.notes == ("dataset 'set': 4 (0.png, 1.png, 2.png, ...) without a face that was found: cut at a place drawn for each",)
    assert at_random.notes == at_random.faceless == ()


def test_without_faces_wanted_no_image_is_searched(keep, found, nothing_is_read):
    keep("face.png", portrait(640, 320, (420, 160, 150)))

    assert found(crop_style="center").samples[0].geometry.crop.left == 64


def test_another_style_and_back_is_said_and_searches_nothing_again(keep, found, request):
    keep("face.png", portrait(640, 320, (420, 160, 150)))
    first = found()
    found(crop_style="center")

    request.getfixturevalue("nothing_is_read")
    again = found()

    assert "crop was square center, is now square face" in again.settings
    assert again.samples == first.samples


def test_an_image_that_cannot_be_decoded_has_no_face_and_hides_no_other(keep, found):
    keep("good.png", portrait(640, 320, (420, 160, 150)))
    Path("images/torn.png").write_bytes(with_tail(Path("images/good.png").read_bytes())[:-100])

    discovery = found()

    assert [sample.name for sample in discovery.samples] == ["good.png", "torn.png"]
    assert discovery.faceless == ("torn.png",)


def test_a_turn_that_stands_behind_the_picture_moves_the_window_with_the_face(keep, found):
    """The face is found in the whole file, the size in its first bytes alone, until the file is read whole."""
    path = keep("late.png", portrait(320, 640, (160, 480, 150)).transpose(Image.Transpose.ROTATE_90))
    turn = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    path.write_bytes(with_tail(path.read_bytes(), turn))
    book = ContentBook(Path("cache/index"))
    images = ImageReader({"set": LocalBackend(LocalOptions(id="set", instance_data_dir="images"))}, book)

    with pytest.raises(SetAside, match="it is 320x640 pixels, its header alone said 640x320"):
        images.open(found().samples[0])
    book.save()

    assert found().samples[0].geometry == Geometry(Size(320, 640), Size(128, 256), Crop(0, 128, 128, 128))


def test_a_missing_package_names_its_extra(dataset_of, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"crop_style 'face' needs the package cv2, .* pip install 'simpletuner\[faces\]'"):
        dataset_of(**FACE)


def test_an_opencv_without_cascades_names_its_extra(monkeypatch):
    newer = type(sys)("cv2")
    newer.__version__ = "5.0.0"
    monkeypatch.setitem(sys.modules, "cv2", newer)

    with pytest.raises(ConfigError, match=r"needs OpenCV 4; 5\.0\.0") as told:
        FaceFinder()

    assert told.value.hint == "pip install 'simpletuner[faces]'"
