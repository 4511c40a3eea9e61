"""Copies within a dataset, between datasets, and across evaluation."""

from __future__ import annotations

import shutil

from PIL import ImageOps

from simpletuner.data.doctor.table import verdict
from tests.builders.demonstration import landscape

TRAIN = {"id": "train", "instance_data_dir": "train", "caption_strategy": "filename"}
HELD = {"id": "held", "instance_data_dir": "held", "caption_strategy": "filename"}


def complaints(report, dataset, name):
    one = next(one for one in report.datasets if one.id == dataset)
    return [str(each) for each in one.complaints.get(name, ())]


def test_copies_in_one_dataset_name_each_other(draw, check, problems, workplace):
    for number in range(4):
        draw(f"images/{number}.png", 96, 64, seed=number)
    shutil.copy(workplace / "images/1.png", workplace / "images/z.png")
    landscape(96, 64, 2).resize((192, 128)).save(workplace / "images/y.jpg", quality=90)

    report = check()

    assert [problem.files for problem in problems(report, "exact duplicate")] == [("1.png", "z.png")]
    assert [set(problem.files) for problem in problems(report, "near duplicate")] == [{"2.png", "y.jpg"}]
    assert complaints(report, "set", "z.png") == ["exact duplicate: 1.png"]
    assert complaints(report, "set", "2.png") == ["near duplicate: y.jpg"]
    assert complaints(report, "set", "3.png") == []


def test_a_mirrored_copy_is_a_near_duplicate_and_says_so(draw, check, problems, workplace):
    for number in range(4):
        draw(f"train/{number}.png", 96, 64, seed=number)
    draw("held/new.png", 96, 64, seed=50)
    ImageOps.mirror(landscape(96, 64, 2)).resize((192, 128)).save(workplace / "train/y.jpg", quality=90)
    ImageOps.mirror(landscape(96, 64, 3)).save(workplace / "held/three.png")

    report = check(TRAIN, {**HELD, "dataset_type": "eval"})

    assert complaints(report, "train", "2.png") == ["near duplicate: y.jpg (mirrored)"]
    assert complaints(report, "train", "y.jpg") == ["near duplicate: 2.png (mirrored)"]
    assert complaints(report, "held", "three.png") == ["near leak: nearly the same train/3.png (mirrored)"]
    assert problems(report, "exact duplicate") == problems(report, "leak") == []


def test_a_picture_on_both_sides_of_evaluation_is_a_leak_and_comes_first(draw, check, problems, workplace):
    for number in range(12):
        draw(f"train/{number}.png", 96, 64, seed=number)
    draw("held/new.png", 96, 64, seed=50)
    (workplace / "train" / "copy.png").write_bytes((workplace / "train/7.png").read_bytes())
    shutil.copy(workplace / "train/7.png", workplace / "held/seven.png")
    landscape(96, 64, 3).save(workplace / "held/three.jpg", quality=70)

    report = check(TRAIN, HELD, evals=["held"])

    assert report.problems[0].kind == "leak"
    assert [(one.dataset, one.files, one.message) for one in problems(report, "leak")] == [
        ("held", ("seven.png",), "1 image is also in dataset 'train'")
    ]
    assert [(one.dataset, one.files) for one in problems(report, "near leak")] == [("held", ("three.jpg",))]
    assert complaints(report, "held", "seven.png") == ["leak: also train/7.png, train/copy.png"]
    assert complaints(report, "train", "copy.png") == ["exact duplicate: 7.png", "leak: also held/seven.png"]
    assert problems(report, "shared") == []
    assert report.is_usable and "warning" in verdict(report)


def test_a_folder_in_two_training_datasets_is_only_a_note(draw, check, problems):
    for number in range(3):
        draw(f"train/{number}.png", seed=number)

    report = check(TRAIN, {**TRAIN, "id": "again", "resolution": 64})

    assert [(one.dataset, len(one.files), one.severity) for one in problems(report, "shared")] == [("train", 3, "note")]
    assert complaints(report, "again", "1.png") == ["shared: also train/1.png"]
