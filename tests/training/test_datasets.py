"""What a start says of its datasets, what it encodes for them, and when they take part."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy
import pytest
from PIL import Image

from tests.builders.portrait import portrait
from tests.builders.run import add_pictures, command, train_in_process, write_run

PICTURES = {"id": "pictures", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True, "crop_style": "center"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def said(folder: Path, capsys, *arguments: str, code: int = 0) -> str:
    """Start again from nothing, on the caches that are there, and give what was printed, on one line."""
    capsys.readouterr()
    assert train_in_process(folder, "--resume_from_checkpoint", "", *arguments) == code
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


def change_dataset(folder: Path, **keys) -> None:
    file = folder / "multidatabackend.json"
    entries = json.loads(file.read_text())
    entries[0].update(keys)
    file.write_text(json.dumps(entries))


def test_a_start_says_what_changed_and_what_there_is_to_encode(tmp_path, capsys):
    write_run(tmp_path, pictures=4, max_train_steps=1)
    (tmp_path / "pictures" / "unread.txt").write_text("no image")

    assert "dataset 'pictures': 4 new; 4 to encode" in said(tmp_path, capsys)
    assert "to encode" not in said(tmp_path, capsys)

    add_pictures(tmp_path / "pictures", 2, first=20)
    add_pictures(tmp_path / "pictures", 1, first=1, size=(56, 40))
    (tmp_path / "pictures" / "picture_000.png").unlink()
    os.utime(tmp_path / "pictures" / "picture_002.png", ns=(1, 1))
    assert "dataset 'pictures': 2 new, 1 changed, 1 gone; 3 to encode" in said(tmp_path, capsys)

    assert "dataset 'pictures': resolution was 32 px on the shorter edge, is now 48 px on the shorter edge; 5 to encode" in said(
        tmp_path, capsys, "--resolution", "48"
    )
    change_dataset(tmp_path, crop_style="corner")
    assert "crop was square center, is now square corner; 1 to encode" in said(tmp_path, capsys)
    change_dataset(tmp_path, caption_strategy="textfile")
    for path in (tmp_path / "pictures").glob("*.png"):
        path.with_suffix(".txt").write_text("words")
    words = said(tmp_path, capsys)
    assert "captions 5 new; captions was filename, is now textfile; 0 to encode" in words
    (tmp_path / "pictures" / "picture_001.txt").write_text("other words")
    assert "dataset 'pictures': captions 1 changed; 0 to encode" in said(tmp_path, capsys)


def test_a_picture_that_is_found_damaged_when_it_is_read_is_skipped_said_once_and_left_alone(tmp_path, capsys):
    write_run(tmp_path, pictures=5, max_train_steps=2)
    pixels = numpy.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=numpy.uint8)
    damaged = tmp_path / "pictures" / "damaged.jpg"
    Image.fromarray(pixels).save(damaged, quality=100)
    damaged.write_bytes(damaged.read_bytes()[:20_000])

    words = said(tmp_path, capsys)

    assert words.count("1 (damaged.jpg) skipped, truncated: the file ends before the picture does") == 1
    assert "5 images in 1 bucket" in words
    assert "6 new; 6 to encode" in words
    assert damaged.stat().st_size == 20_000
    again = said(tmp_path, capsys)
    assert "to encode" not in again and "1 (damaged.jpg) skipped, truncated" in again


@pytest.mark.parametrize("kept_bytes", [0, 20_000])  # a header shows the first, only reading it whole the second
def test_broken_pictures_end_the_run_where_that_is_asked_for(tmp_path, capfd, kept_bytes):
    write_run(tmp_path, pictures=5, max_train_steps=2, broken_images="refuse")
    pixels = numpy.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=numpy.uint8)
    damaged = tmp_path / "pictures" / "damaged.jpg"
    Image.fromarray(pixels).save(damaged, quality=100)
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])

    assert train_in_process(tmp_path) == 3

    assert "dataset 'pictures': 1 (damaged.jpg) skipped" in capfd.readouterr().err and not (tmp_path / "output" / "checkpoint-2").exists()
    damaged.unlink()
    assert train_in_process(tmp_path) == 0


@pytest.mark.parametrize("option", ["vae_cache_ondemand", "vae_cache_disable"])
def test_on_demand_a_damaged_picture_is_left_out_of_its_batch(tmp_path, capsys, option):
    write_run(tmp_path, pictures=5, max_train_steps=6, **{option: True})
    pixels = numpy.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=numpy.uint8)
    damaged = tmp_path / "pictures" / "damaged.jpg"
    Image.fromarray(pixels).save(damaged, quality=100)
    damaged.write_bytes(damaged.read_bytes()[:20_000])

    words = said(tmp_path, capsys)

    assert words.count("pictures/damaged.jpg is skipped, truncated") == 1
    assert "1 (damaged.jpg) skipped, truncated" in said(tmp_path, capsys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"start_step": 1}, "no dataset takes part from step 1 on, in epoch 1; the run has 6 steps"),
        ({"end_step": 4}, "no dataset takes part from step 5 on"),
        ({"end_epoch": 1}, "no dataset takes part from step 4 on, in epoch 2"),
        ({"start_epoch": 3, "end_epoch": 2}, "end_epoch 2 is before start_epoch 3"),
        ({"start_epoch": "soon"}, "start_epoch is 'soon'; it must be a whole number"),
    ],
)
def test_a_step_without_any_dataset_is_refused_at_the_start(tmp_path, capsys, keys, words):
    write_run(tmp_path, datasets=[{**PICTURES, **keys}])

    assert words in said(tmp_path, capsys, code=2)
    assert not (tmp_path / "cache" / "vae").exists()


def test_a_dataset_may_end_with_the_run(tmp_path, capsys):
    write_run(tmp_path, pictures=5, datasets=[{**PICTURES, "end_epoch": 2}], max_train_steps=None, num_train_epochs=2)

    assert "steps 6 of 2 images" in said(tmp_path, capsys)


def test_kept_crops_are_all_encoded_and_adding_more_encodes_only_these(tmp_path, capsys):
    keys = {"crop_style": "random", "crops_per_image": 2, "maximum_image_size": 1024, "target_downsample_size": 512}
    write_run(tmp_path, datasets=[{**PICTURES, **keys}], max_train_steps=1)

    assert "6 new; 12 to encode" in said(tmp_path, capsys)
    change_dataset(tmp_path, crops_per_image=3)
    assert "crops_per_image was 2, is now 3; 6 to encode" in said(tmp_path, capsys)


def test_pictures_are_cut_around_faces_and_those_without_are_counted(tmp_path, capsys):
    write_run(tmp_path, datasets=[{**PICTURES, "crop_style": "face"}], max_train_steps=1)
    portrait(320, 160, (230, 80, 110)).save(tmp_path / "pictures/face.png")
    portrait(320, 160, (230, 80, 110)).save(tmp_path / "pictures/copy.png")

    first = said(tmp_path, capsys)
    assert "8 new" in first and "6 (" in first and "without a face that was found: cut at a place drawn for each" in first
    assert "to encode" not in said(tmp_path, capsys)
    portrait(320, 160, (90, 80, 110)).save(tmp_path / "pictures/face.png")
    assert "1 changed; 1 to encode" in said(tmp_path, capsys)


@pytest.mark.slow
def test_two_processes_agree_on_pictures_that_only_one_of_them_found_damaged(tmp_path):
    write_run(tmp_path, pictures=7, max_train_steps=2, train_batch_size=1, checkpoint_step_interval=0)
    pixels = numpy.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=numpy.uint8)
    damaged = tmp_path / "pictures" / "damaged.jpg"
    Image.fromarray(pixels).save(damaged, quality=100)
    damaged.write_bytes(damaged.read_bytes()[:20_000])

    process = command(tmp_path, "--num_processes", "2")
    words, _ = process.communicate(timeout=240)

    assert process.returncode == 0, words
    assert words.count("1 (damaged.jpg) skipped, truncated") == 1
    assert "8 new; 8 to encode" in words
    assert "7 images in 1 bucket" in " ".join(words.split())


def test_windows_count_steps_also_when_a_run_goes_on_with_another_accumulation(tmp_path, capsys):
    plain = {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True, "end_step": 6}
    options = {"datasets": [plain], "pictures": 8, "train_batch_size": 1, "checkpoint_step_interval": 3}
    write_run(tmp_path, **options, gradient_accumulation_steps=2, max_train_steps=3)
    assert train_in_process(tmp_path) == 0
    write_run(tmp_path, **options, gradient_accumulation_steps=1, max_train_steps=6)

    assert train_in_process(tmp_path) == 0, capsys.readouterr().err

    state = json.loads((tmp_path / "output" / "checkpoint-6" / "training_state.json").read_text())
    assert state["position"] == 6


def test_a_dataset_that_is_never_drawn_is_named(tmp_path, capsys):
    write_run(tmp_path, pictures=4, max_train_steps=2)
    plan = tmp_path / "multidatabackend.json"
    first, texts = json.loads(plan.read_text())
    add_pictures(tmp_path / "late", 2, first=30)
    late = {**first, "id": "late", "instance_data_dir": "late", "start_step": 50, "probability": 0.5}
    plan.write_text(json.dumps([first, late, texts]))

    words = said(tmp_path, capsys)

    assert "dataset 'late': none of it is trained on, the run ends before it takes part" in words
    assert "probability 0.5, steps 51 to the end" in words and words.count("none of it is trained on") == 1
