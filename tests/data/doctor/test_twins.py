"""Copies within a dataset, between datasets, and across evaluation."""

from __future__ import annotations

import shutil

from PIL import ImageOps

from simpletuner.data.doctor.table import show, verdict
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

    [exact], [near] = problems(report, "exact duplicate"), problems(report, "near duplicate")
    assert (exact.files, exact.message, exact.examples) == (("1.png", "z.png"), "1 image and its exact copy", ("1.png = z.png",))
    assert (set(near.files), near.message, near.examples) == ({"2.png", "y.jpg"}, "2 images nearly like another", ("2.png like y.jpg",))
    assert complaints(report, "set", "z.png") == ["exact duplicate: 1.png"]
    assert complaints(report, "set", "2.png") == ["near duplicate: y.jpg"]
    assert complaints(report, "set", "3.png") == []


def test_copies_are_counted_apart_from_what_they_are_copies_of(draw, check, problems, workplace):
    for number in range(2):
        draw(f"images/{number}.png", 96, 64, seed=number)
    for number, name in ((0, "x"), (0, "y"), (1, "z")):
        shutil.copy(workplace / f"images/{number}.png", workplace / f"images/{name}.png")

    [problem] = problems(check(), "exact duplicate")

    assert problem.message == "2 images and their 3 exact copies"
    assert problem.examples == ("0.png = x.png", "x.png = y.png", "1.png = z.png")


def test_the_table_pairs_what_is_alike(draw, check, console, said, workplace):
    draw("images/a.png", 96, 64, seed=1)
    draw("images/b.png", 96, 64, seed=2)
    ImageOps.mirror(landscape(96, 64, 1)).save(workplace / "images/z.png")
    landscape(96, 64, 2).resize((192, 128)).save(workplace / "images/y.jpg", quality=90)

    show(check(), console)

    assert "4 images nearly like another (a.png like z.png (mirrored); b.png like y.jpg)" in said.getvalue().replace(
        "b.png like y.jpg; a.png like z.png (mirrored)", "a.png like z.png (mirrored); b.png like y.jpg"
    )


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


def test_four_datasets_over_one_folder_have_one_note_for_each_two_of_them(draw, check, problems, workplace):
    for number in range(3):
        draw(f"train/{number}.png", 96, 64, seed=number)
    landscape(96, 64, 2).resize((192, 128)).save(workplace / "train/near.jpg", quality=90)

    report = check(*({**TRAIN, "id": name, "resolution": size} for name, size in (("a", 32), ("b", 40), ("c", 48), ("d", 56))))

    assert [(one.dataset, one.message) for one in problems(report, "shared")] == [
        (one, f"4 images are also in dataset {other!r}") for one, other in ("ab", "ac", "ad", "bc", "bd", "cd")
    ]
    assert complaints(report, "d", "2.png") == ["near duplicate: near.jpg", "shared: also a/2.png", "shared: also b/2.png", "shared: also c/2.png"]


def test_what_two_datasets_share_and_what_is_nearly_alike_stand_in_one_line(draw, check, problems, workplace):
    for number in range(3):
        draw(f"train/{number}.png", 96, 64, seed=number)
    draw("other/0.png", 96, 64, seed=0)
    landscape(96, 64, 1).resize((192, 128)).save(workplace / "other/near.jpg", quality=90)

    report = check(TRAIN, {**HELD, "id": "other", "instance_data_dir": "other"})

    assert [(one.dataset, one.message) for one in problems(report, "shared")] == [("train", "1 image is also in dataset 'other', and 1 nearly")]
    assert complaints(report, "other", "near.jpg") == ["shared: nearly the same train/1.png"]
