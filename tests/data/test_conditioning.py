"""Which files go along with which pictures, and how they are cut."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from simpletuner.data.companions import find_companions, is_alike, paired
from simpletuner.data.crops import with_crop
from simpletuner.data.discover import discover
from simpletuner.data.images import read_mask, read_pixels, read_segmentation
from simpletuner.errors import ConfigError, DatasetError
from simpletuner.types import Crop, Geometry, Size

PICTURES = {"id": "set", "instance_data_dir": "images", "caption_strategy": "filename"}
MASKS = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}


@pytest.fixture
def folders(workplace):
    for name in ("images", "masks", "more"):
        (workplace / name).mkdir()
    return workplace


def test_either_side_may_name_the_other(folders, plan_of):
    by_source = plan_of(PICTURES, {**MASKS, "source_dataset_id": "set"})
    by_data = plan_of({**PICTURES, "conditioning_data": "masks"}, MASKS)
    by_both = plan_of({**PICTURES, "conditioning_data": ["masks"]}, {**MASKS, "source_dataset_id": "set"})
    of_two = plan_of(
        {**PICTURES, "conditioning_data": "masks"},
        {**PICTURES, "id": "held out", "instance_data_dir": "more", "dataset_type": "eval", "conditioning_data": "masks"},
        MASKS,
    )

    for plan in (by_source, by_data, by_both):
        assert [(one.id, one.kind, one.sources) for one in plan.conditioning] == [("masks", "mask", ("set",))]
        assert not plan.notes and "masks: mask of set; files in masks" in "\n".join(plan.describe())
    assert of_two.conditioning[0].sources == ("set", "held out")
    assert [dataset.id for dataset in of_two.datasets] == ["set"] and [dataset.id for dataset in of_two.held_out] == ["held out"]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (
            [{**MASKS, "conditioning_type": None, "source_dataset_id": "set"}],
            "dataset 'masks': conditioning_type is needed: one of mask, segmentation",
        ),
        ([{**MASKS, "conditioning_type": "maks", "source_dataset_id": "set"}], "conditioning_type is 'maks'; did you mean 'mask'?"),
        ([{**MASKS, "conditioning_type": "controlnet", "source_dataset_id": "set"}], "conditioning_type is 'controlnet', which is not available yet"),
        ([MASKS], "dataset 'masks': no dataset uses it; name it in the conditioning_data of a dataset of pictures"),
        ([{**MASKS, "source_dataset_id": "sett"}], "source_dataset_id is 'sett'; did you mean 'set'?"),
        ([{**PICTURES, "id": "b", "conditioning_data": "mask"}, {**MASKS, "source_dataset_id": "b"}], "conditioning_data names 'mask'; did you mean"),
        (
            [{**MASKS, "source_dataset_id": "set"}, {**MASKS, "id": "other", "source_dataset_id": "set", "instance_data_dir": "more"}],
            "datasets 'masks' and 'other' are both masks of 'set'; a picture has one mask",
        ),
        ([{**MASKS, "source_dataset_id": "set", "cache_dir_vae": "cache/vae/auraflow/set"}], "have the same cache_dir_vae"),
        ([{**MASKS, "source_dataset_id": "set", "instance_data_dir": "gone"}], "dataset 'masks': folder gone does not exist"),
        (
            [{**MASKS, "source_dataset_id": "set", "instance_data_dir": "images"}],
            "'set' and 'masks' lie in one place, images: a picture would go along",
        ),
        ([{**PICTURES, "id": "b", "conditioning_data": 7}], "dataset 'b': conditioning_data is 7; it must be a list"),
        ([{**PICTURES, "id": "b", "conditioning_data": [{"id": "masks"}]}], "dataset 'b': conditioning_data"),
    ],
)
def test_what_is_wrong_with_conditioning_is_named(folders, plan_of, entries, problem):
    with pytest.raises((ConfigError, DatasetError)) as caught:
        plan_of(PICTURES, *entries)
    assert problem in caught.value.message


def test_what_has_no_effect_is_named(folders, plan_of):
    plan = plan_of(
        {**PICTURES, "source_dataset_id": "set"},
        {**PICTURES, "id": "held out", "instance_data_dir": "more", "dataset_type": "eval", "repeats": 3, "is_regularisation_data": True},
        {**MASKS, "source_dataset_id": "set", "resolution": 512, "caption_strategy": "textfile"},
        {**MASKS, "id": "of nobody", "source_dataset_id": "off"},
        {**PICTURES, "id": "off", "disabled": True},
    )

    assert plan.notes == (
        "dataset 'set': source_dataset_id without effect: that is said of a conditioning dataset",
        "dataset 'held out': repeats, is_regularisation_data without effect: it is never trained on",
        "dataset 'masks': caption_strategy, resolution without effect: its files are resized and cropped as the pictures that they go along with",
        "dataset 'of nobody': left out, since its source_dataset_id 'off' is disabled",
    )
    assert [one.id for one in plan.conditioning] == ["masks"] and not plan.held_out[0].is_regularisation


def test_a_companion_is_cut_as_its_picture_is(folders, plan_of, save, console):
    save("a/cat.jpg", 96, 64)
    (folders / "masks" / "a").mkdir()
    ramp = np.tile(np.arange(192, dtype=np.uint8), (128, 1))  # twice the size of the picture, brighter to the right
    Image.fromarray(ramp).save(folders / "masks" / "a" / "cat.png")
    plan = plan_of({**PICTURES, "crop": True, "crop_style": "random", "conditioning_data": "masks"}, MASKS)
    [picture] = discover(plan.datasets[0], folders / "index", 3, console).samples
    companions = find_companions(plan.conditioning[0], folders / "index", console)

    for number in range(4):
        cut = with_crop(picture, number, seed=3)
        mask = companions.of(cut)
        pixels = read_mask((folders / "masks" / "a" / "cat.png").read_bytes(), mask.geometry, "mask")
        left = cut.geometry.crop.left * 192 / cut.geometry.resized.width / 255
        assert pixels.shape == (1, 32, 32) and mask.geometry.original == Size(192, 128)
        assert abs(float(pixels[0, 5, 0]) - left) < 0.02 and float(pixels.min()) >= 0 and float(pixels.max()) <= 1


def test_a_loose_reference_covers_the_bucket(folders, plan_of, save, console):
    save("cat.jpg", 96, 64)
    Image.new("RGB", (50, 400)).save(folders / "masks" / "cat.webp")
    loose = {**MASKS, "conditioning_type": "reference_loose", "source_dataset_id": "set"}
    plan = plan_of(PICTURES, loose)
    [picture] = discover(plan.datasets[0], folders / "index", 3, console).samples

    reference = find_companions(plan.conditioning[0], folders / "index", console).of(picture)

    bucket, crop = picture.geometry.bucket, reference.geometry.crop
    assert reference.geometry.bucket == bucket and reference.geometry.resized.width == bucket.width
    assert crop.top == (reference.geometry.resized.height - bucket.height) // 2
    assert read_pixels((folders / "masks" / "cat.webp").read_bytes(), reference.geometry, "cat").shape == (3, bucket.height, bucket.width)


def test_a_segmentation_counts_what_is_not_black_however_dark(folders):
    image = Image.new("RGB", (64, 64))
    image.paste((0, 0, 1), (0, 0, 32, 64))
    image.save(folders / "map.png")
    cut = Geometry(Size(64, 64), Size(16, 16), Crop(0, 0, 16, 8))
    found = read_segmentation((folders / "map.png").read_bytes(), cut, "map")

    assert found.shape == (1, 8, 16)
    assert bool((found[..., :7] == 1).all()) and bool((found[..., 9:] == 0).all())


def test_what_is_transparent_does_not_count(folders):
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 64))
    image.save(folders / "painted.png")
    whole = Geometry(Size(64, 64), Size(64, 64), Crop(0, 0, 64, 64))

    for read in (read_mask, read_segmentation):
        found = read((folders / "painted.png").read_bytes(), whole, "painted")
        assert bool((found[..., :32] == 1).all()) and bool((found[..., 32:] == 0).all())


def test_doubles_and_blurred_segmentations_are_named(folders, plan_of, save, console):
    save("cat.jpg")
    Image.new("L", (48, 32)).save(folders / "masks" / "cat.jpg")
    Image.new("L", (48, 32)).save(folders / "masks" / "cat.png")
    plan = plan_of(PICTURES, {**MASKS, "conditioning_type": "segmentation", "source_dataset_id": "set"})

    notes = find_companions(plan.conditioning[0], folders / "index", console).notes

    assert notes == (
        "dataset 'masks': 1 (cat.png) not used: another file has the same name but for the suffix",
        "dataset 'masks': 1 (cat.jpg) JPEG, which is not black where it should be; save segmentations as PNG",
    )


def test_a_dataset_of_which_nothing_has_a_mask_is_an_error(folders, plan_of, save, console):
    save("cat.jpg")
    plan = plan_of(PICTURES, {**MASKS, "source_dataset_id": "set"})
    companions = find_companions(plan.conditioning[0], folders / "index", console)

    with pytest.raises(DatasetError) as caught:
        paired(plan.datasets[0], discover(plan.datasets[0], folders / "index", 3, console), [companions])

    assert "dataset 'set': none of its 1 images goes with 'masks' (masks)" in caught.value.message
    assert "1 (cat.jpg) skipped, no companion" in caught.value.message


def test_shapes_are_alike_but_for_rounding():
    assert is_alike(Size(1000, 667), Size(3000, 2000)) and is_alike(Size(40, 40), Size(40, 40))
    assert not is_alike(Size(1000, 640), Size(3000, 2000)) and not is_alike(Size(2000, 3000), Size(3000, 2000))
