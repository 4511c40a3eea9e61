"""What a folder of pictures is found to hold."""

from __future__ import annotations

import pytest
from PIL import Image

from simpletuner.cli.wizard.pictures import is_telling, look_at_folder, problem_with, spread
from tests.builders.run import add_pictures


def test_sizes_captions_copies_and_faults_are_counted(tmp_path):
    add_pictures(tmp_path / "cats", 4, (60, 40))
    (tmp_path / "cats/picture_000.txt").write_text("a tabby cat\nanother line")
    (tmp_path / "cats/copy of it.png").write_bytes((tmp_path / "cats/picture_001.png").read_bytes())
    (tmp_path / "cats/deeper").mkdir()
    Image.new("RGB", (30, 90), "red").save(tmp_path / "cats/deeper/a_red_door.jpg")
    (tmp_path / "cats/broken.png").write_bytes(b"")
    (tmp_path / "cats/raw.heic").write_bytes(b"x")
    (tmp_path / "cats/table.csv").write_text("a,b")

    found = look_at_folder(str(tmp_path / "cats"))

    assert sorted(found.sizes) == [(30, 90), *[(60, 40)] * 5]
    assert (found.with_text, found.telling_names, found.copies) == (1, 2, 1)
    assert found.faults == {"zero-byte": 1, "unsupported": 1}
    assert found.captions["textfile"] == ("a tabby cat",) and "a red door" in found.captions["filename"]
    said = "\n".join(found.described())
    assert "6 pictures, from 60x40 to 30x90" in said and "table.csv" in said and "1 byte for byte" in said


def test_a_folder_without_pictures_is_refused_in_words(tmp_path):
    (tmp_path / "empty").mkdir()

    assert "does not exist" in str(problem_with(str(tmp_path / "nowhere")))
    assert "holds no pictures" in str(problem_with(str(tmp_path / "empty")))
    assert problem_with(" ") == "name a folder"


@pytest.mark.parametrize(("name", "tells"), [("a_red_door.png", True), ("x/blue cat.jpg", True), ("IMG_2034.jpg", False), ("0001.png", False)])
def test_names_of_cameras_tell_nothing(name, tells):
    assert is_telling(name) is tells


def test_a_sample_of_many_is_spread_over_all():
    assert spread([str(number) for number in range(10)], 5) == ["0", "2", "4", "6", "8"]
