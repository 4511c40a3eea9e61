"""The whole examination: what is skipped, what is unusable, and that one bad dataset hides no other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.discover import discover
from simpletuner.data.doctor.as_json import as_json
from simpletuner.data.doctor.findings import KINDS, Problem
from simpletuner.data.doctor.table import PROBLEMS_SHOWN, show
from simpletuner.data.geometry import fit
from simpletuner.data.index import digest
from simpletuner.errors import ConfigError
from simpletuner.types import Size
from tests.builders.demonstration import MODEL, encoded, landscape
from tests.builders.portrait import portrait

GOOD = {"id": "good", "instance_data_dir": "images"}


def test_every_image_stands_in_the_json_with_its_geometry(draw, check, plan_of):
    for number in range(3):
        draw(f"images/{number}.png", 90 + 15 * number, 60, seed=number)
    rule = plan_of(GOOD).datasets[0].geometry

    [backend] = json.loads(json.dumps(as_json(check(GOOD))))["backends"]

    assert (backend["id"], backend["type"], backend["place"], backend["error"]) == ("good", "local", "images", None)
    assert backend["counts"]["images"] == 3
    assert sum(row["images"] for row in backend["buckets"].values()) == 3
    for number, image in enumerate(backend["images"]):
        geometry = fit(Size(90 + 15 * number, 60), rule, 0)
        crop = geometry.crop
        assert image == {
            "file": f"{number}.png",
            "original": [90 + 15 * number, 60],
            "resized": [geometry.resized.width, geometry.resized.height],
            "crop": [crop.left, crop.top, crop.width, crop.height],
            "bucket": str(geometry.bucket),
            "captions": [str(number)],
            "problems": [],
        }
        assert image["bucket"] in backend["buckets"]


def test_every_skipped_file_is_named_with_its_rule(draw, check, problems, workplace):
    for number in range(3):
        draw(f"images/{number}.png", seed=number)
    draw("images/small.png", 8, 8)
    whole = draw("images/whole.jpg", seed=7).read_bytes()
    (workplace / "images/cut.jpg").write_bytes(whole[:-200])
    (workplace / "images/empty.png").write_bytes(b"")
    (workplace / "images/text.png").write_bytes(b"text")

    report = check({**GOOD, "minimum_image_size": 16})

    [backend] = as_json(report)["backends"]
    told = {each["file"]: each["rule"] for each in backend["skipped"]}
    assert told == {"empty.png": "zero-byte", "text.png": "broken", "cut.jpg": "truncated", "small.png": "too small"}
    assert backend["counts"]["skipped"] == 4
    assert [image["file"] for image in backend["images"]] == ["0.png", "1.png", "2.png", "whole.jpg"]
    assert problems(report, "truncated")[0].files == ("cut.jpg",)
    assert report.is_usable


def test_an_image_that_only_decoding_finds_broken_is_skipped_and_the_next_start_knows(draw, check, problems, workplace, dataset_of, console):
    draw("images/good.png", seed=1)
    data = encoded(landscape(64, 64, 2), "WEBP", lossless=True)
    (workplace / "images/bad.webp").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))

    report = check(GOOD)

    assert problems(report, "broken")[0].files == ("bad.webp",)
    assert [sample.name for sample in report.datasets[0].samples] == ["good.png"]
    assert report.is_usable
    again = discover(dataset_of(id="good"), workplace / "cache/index", 42, console)
    assert again.skipped == {"broken": ("bad.webp",)} and again.samples[0].content != ""


def test_a_run_after_the_doctor_reads_no_image_to_know_its_contents(draw, check, workplace, dataset_of, console, monkeypatch):
    for number in range(3):
        draw(f"images/{number}.png", seed=number)
    check(GOOD)

    monkeypatch.setattr(LocalBackend, "read", lambda self, name: pytest.fail(f"{name} was read"))
    samples = discover(dataset_of(id="good"), workplace / "cache/index", 42, console).samples

    assert [sample.content for sample in samples] == [digest((workplace / "images" / sample.name).read_bytes()) for sample in samples]


def test_images_without_a_face_are_listed_where_faces_are_wanted(workplace, check, problems):
    (workplace / "images").mkdir()
    portrait(320, 160, (230, 80, 110)).save(workplace / "images/face.png")
    portrait(320, 160).save(workplace / "images/none.png")

    report = check({**GOOD, "crop": True, "crop_style": "face"})

    assert [(one.files, one.message) for one in problems(report, "no face")] == [(("none.png",), "1 image without a face that was found")]
    [backend] = as_json(report)["backends"]
    left = {image["file"]: image["crop"][0] for image in backend["images"]}
    assert left["face.png"] == pytest.approx(64 * 230 / 320 - 16, abs=2)


def test_pictures_without_their_mask_are_skipped_as_the_run_skips_them(draw, check, workplace):
    for number in range(3):
        draw(f"images/{number}.png", seed=number)
    for number in range(2):
        draw(f"masks/{number}.png", seed=number)

    report = check(
        {**GOOD, "conditioning_data": "masks"},
        {"id": "masks", "dataset_type": "conditioning", "instance_data_dir": "masks", "conditioning_type": "mask"},
    )

    assert [one.skipped for one in report.datasets] == [{"no companion": ("2.png",)}]
    assert len(report.datasets[0].samples) == 2 and report.is_usable


def test_one_unusable_dataset_hides_no_other(draw, check, workplace):
    draw("images/a.png")
    (workplace / "empty").mkdir()

    report = check({"id": "gone", "instance_data_dir": "nowhere"}, GOOD, {"id": "empty", "instance_data_dir": "empty"})

    told = {one.id: (len(one.samples), one.error) for one in report.datasets}
    assert told["good"] == (1, None)
    assert "nowhere does not exist" in told["gone"][1]
    assert "is empty" in told["empty"][1]
    assert not report.is_usable
    assert [problem.dataset for problem in report.problems if problem.severity == "error"] == ["gone", "empty"]


def test_too_few_images_for_a_step_and_sizes_the_model_refuses_are_errors(draw, check, problems):
    draw("images/a.png")
    model = replace(MODEL, refuse_size=lambda size: f"{size} is too large")

    report = check(GOOD, model=model, training={"train_batch_size": 4})

    assert [problem.message.split(":")[0] for problem in problems(report, "unusable")] == [
        "40x24 is too large",
        "1 images with repeats 0 are 1 draws an epoch, one optimizer step needs 4 (train_batch_size 4 x gradient_accumulation_steps 1)",
    ]
    assert "Set repeats to 3" in problems(report, "unusable")[1].hint


def test_images_that_become_a_size_that_the_model_refuses_are_named_with_their_sizes(draw, check, console, said, problems):
    draw("images/good.png", 96, 64)
    draw("images/long.png", 960, 32, seed=1)
    model = replace(MODEL, refuse_size=lambda size: f"{size} is too large" if size.width > 100 else None)

    report = check(GOOD, model=model)

    [problem] = problems(report, "unusable")
    assert problem.files == ("long.png",) and problem.examples == ("long.png, 960x32",)
    assert "is too large: 1 image becomes that by" in problem.message
    assert all(option in problem.hint for option in ("resolution", "crop", "maximum_aspect_ratio", "minimum_aspect_ratio"))
    [told] = [image for image in as_json(report)["backends"][0]["images"] if image["problems"] and "unusable" in image["problems"][-1]]
    assert told["file"] == "long.png" and "960x32 becomes" in told["problems"][-1]
    show(report, console)
    assert "(long.png, 960x32)" in said.getvalue()


def test_remarks_stand_in_the_table_and_what_is_among_the_problems_does_not(draw, check, console, said, workplace):
    draw("images/a.png")
    landscape(64, 64, 3).convert("RGBA").save(workplace / "images/clear.png")
    (workplace / "images/empty.png").write_bytes(b"")

    show(check(GOOD), console)

    remarks = said.getvalue().split("Remarks")[1]
    assert "1 alpha: transparency laid on white" in remarks and "zero-byte" not in remarks


def test_a_list_of_which_no_address_answers_says_why(check, console, said, workplace):
    (workplace / "list.csv").write_text("url,text\nhttp://127.0.0.1:9/a.png,a\nhttp://127.0.0.1:9/b.png,b\n", encoding="utf-8")

    report = check(
        {"id": "web", "type": "csv", "csv_file": "list.csv", "csv_cache_dir": "got", "csv_caption_column": "text", "caption_strategy": "csv"}
    )
    show(report, console)

    assert "2 not fetched" in said.getvalue() and "http://127.0.0.1:9/a.png" in said.getvalue()
    assert report.problems[0].kind == "unusable" and "network" in report.problems[0].hint


def test_rows_that_name_files_outside_are_shown_as_they_are_written(draw, check, problems, workplace):
    draw("a.png")
    (workplace / "list.csv").write_text("path,text\na.png,a\n../../etc/passwd,b\n/etc/\x1b[31mx.png,c\n", encoding="utf-8")
    entry = {"id": "rows", "type": "csv", "csv_file": "list.csv", "csv_url_column": "path", "csv_caption_column": "text", "caption_strategy": "csv"}

    [problem] = problems(check(entry), "outside")

    assert set(problem.files) == {"'../../etc/passwd'", "'/etc/\\x1b[31mx.png'"}
    assert problem.message.startswith("2 rows skipped, outside: the row names a file outside")
    assert "csv file" in problem.hint


def test_only_the_datasets_that_are_named_are_examined(draw, check):
    draw("images/a.png")

    report = check(GOOD, {**GOOD, "id": "other"}, only=["other"])

    assert [one.id for one in report.datasets] == ["other"]
    with pytest.raises(ConfigError, match="goood") as refused:
        check(GOOD, only=["goood"])
    assert "'good'" in str(refused.value.hint)


def test_problems_are_sorted_by_weight(draw, check):
    draw("images/small.png", 12, 12)
    draw("images/b.png", 96, 64)
    draw("images/thin.png", 320, 60)

    weights = [problem.weight for problem in check().problems]

    assert weights == sorted(weights, reverse=True) and len(weights) > 2
    assert Problem("leak", "a", "x", share=0.01).weight > Problem("cropped away", "a", "x", share=0.5).weight


def test_a_rule_without_advice_is_still_a_problem():
    assert "a rule of tomorrow" not in KINDS
    assert Problem("a rule of tomorrow", "set", "1 file skipped").severity == "warning"


def test_the_table_fits_a_screen_and_says_what_to_do(draw, check, console, said):
    for number in range(30):
        draw(f"images/{number}.png", 60 + 9 * number, 60, seed=number)

    report = check()
    said.truncate(0)
    show(report, console)

    lines = said.getvalue().splitlines()
    assert len(lines) < 30 + 2 * PROBLEMS_SHOWN
    assert max(map(len, lines)) <= 200
    assert "Usable" in lines[-1]
    for problem in report.problems[:PROBLEMS_SHOWN]:
        assert problem.message in said.getvalue() and problem.hint in said.getvalue()
