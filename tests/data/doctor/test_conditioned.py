"""Masks and references beside pictures: which belong together, what is left over, and masks by which nothing counts."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from simpletuner.data.doctor.as_json import as_json
from simpletuner.data.doctor.conditioned import has_weight
from simpletuner.data.doctor.page import PAIRS_SHOWN, page
from simpletuner.data.doctor.table import show
from tests.builders.demonstration import encoded, landscape

PICTURES = {"id": "set", "instance_data_dir": "images", "caption_strategy": "filename", "conditioning_data": "masks"}
MASKS = {"id": "masks", "dataset_type": "conditioning", "instance_data_dir": "masks", "conditioning_type": "mask"}


@pytest.fixture
def masks(draw, workplace):
    """Four pictures; masks of three, of which the third is black, and one of nothing."""
    for number in range(4):
        draw(f"images/{number}.jpg", seed=number)
    (workplace / "masks").mkdir()
    for name, grey in (("0", 255), ("1", 40), ("2", 0), ("stray", 255)):
        Image.new("L", (96, 64), grey).save(workplace / f"masks/{name}.png")


def content_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_masks_stand_in_the_json_with_their_pictures_and_what_is_left_over(masks, check):
    [told] = json.loads(json.dumps(as_json(check(PICTURES, MASKS))))["conditioning"]

    assert told == {
        "id": "masks",
        "kind": "mask",
        "of": ["set"],
        "place": "masks",
        "error": None,
        "files": 4,
        "pairs": [{"dataset": "set", "picture": f"{number}.jpg", "file": f"{number}.png"} for number in range(3)],
        "without_picture": ["stray.png"],
        "pictures_without_file": {"set": ["3.jpg"]},
        "black": ["2.png"],
        "notes": [],
    }


def test_a_black_mask_and_a_file_without_a_picture_are_problems_of_the_mask_dataset(masks, check, problems):
    report = check(PICTURES, MASKS)

    [black], [alone] = problems(report, "black"), problems(report, "no picture")
    assert (black.dataset, black.files, black.severity) == ("masks", ("2.png",), "warning")
    assert (alone.dataset, alone.files, alone.severity) == ("masks", ("stray.png",), "note")
    assert report.is_usable


def test_masks_have_a_table(masks, check, console, said):
    show(check(PICTURES, MASKS), console)

    [line] = [line for line in said.getvalue().splitlines() if line.startswith("masks ")]
    assert line.split() == ["masks", "mask", "set", "4", "3", "1", "1", "1"]
    assert "1 mask is all black" in said.getvalue()


def test_the_page_shows_pictures_beside_their_masks_the_black_ones_first(masks, check, console, draw, workplace):
    for number in range(10, 10 + PAIRS_SHOWN):
        draw(f"images/{number}.jpg", seed=number)
        Image.new("L", (96, 64), 255).save(workplace / f"masks/{number}.png")

    [told] = content_of(page(check(PICTURES, MASKS), console))["conditioning"]

    assert len(told["pairs"]) == PAIRS_SHOWN
    assert (told["pairs"][0]["picture"], told["pairs"][0]["file"], told["pairs"][0]["is_black"]) == ("2.jpg", "2.png", True)
    assert all(all(one["thumbnails"]) for one in told["pairs"])
    assert [(one["title"], one["names"]) for one in told["lists"]] == [
        ("all black", ["2.png"]),
        ("without a picture", ["stray.png"]),
        ("without a file, in set", ["3.jpg"]),
    ]


def test_a_mask_that_cannot_be_decoded_is_told(masks, check, problems, workplace):
    whole = encoded(landscape(96, 64, 2), "WEBP", lossless=True)
    (workplace / "masks/3.webp").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))

    report = check(PICTURES, MASKS)

    assert [(one.dataset, one.files) for one in problems(report, "broken")] == [("masks", ("3.webp",))]


def test_a_mask_folder_that_is_gone_leaves_the_other_datasets_examined(masks, check, draw, console):
    report = check(
        PICTURES, {**MASKS, "instance_data_dir": "nowhere"}, {"id": "other", "instance_data_dir": "images", "caption_strategy": "filename"}
    )

    assert [(one.id, one.error is None) for one in report.datasets] == [("set", False), ("other", True)]
    assert "nowhere does not exist" in report.conditioning[0].error
    assert "nowhere does not exist" in content_of(page(report, console))["conditioning"][0]["error"]


def test_files_of_a_dataset_that_was_not_examined_are_not_called_left_over(masks, draw, check):
    draw("more/stray.jpg", seed=30)
    entries = ({**PICTURES, "conditioning_data": "masks"}, {**PICTURES, "id": "more", "instance_data_dir": "more"}, MASKS)

    assert check(*entries).conditioning[0].without_picture == ()
    assert check(*entries, only=["set"]).conditioning[0].without_picture == ()
    assert check({**PICTURES, "id": "alone", "conditioning_data": []}, *entries, only=["alone"]).conditioning == ()


def test_a_clear_mask_is_black_and_a_dark_segmentation_is_not():
    blue = Image.new("RGB", (8, 8))
    blue.putpixel((3, 3), (0, 0, 9))

    assert has_weight(blue, "segmentation") and not has_weight(blue, "mask")
    assert not has_weight(Image.new("RGB", (8, 8)), "segmentation")
    assert has_weight(Image.new("RGB", (8, 8), (1, 0, 0)), "mask")


def test_a_mask_of_which_all_is_transparent_is_black(masks, check, workplace):
    Image.new("RGBA", (96, 64), (255, 255, 255, 0)).save(workplace / "masks/0.png")

    assert check(PICTURES, MASKS).conditioning[0].black == ("0.png", "2.png")
