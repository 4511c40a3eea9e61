"""Runs with datasets beside those that are trained on: masks, and pictures that are held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.builders.flux2 import build_tiny_flux2
from tests.builders.run import add_pictures, train_in_process, write_run

PICTURES = {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True, "crop_style": "center"}
MASKS = {"id": "masks", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "masks", "source_dataset_id": "pictures"}
HELD_OUT = {"id": "others", "type": "local", "dataset_type": "eval", "instance_data_dir": "others", "caption_strategy": "filename"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def add_masks(folder: Path, count: int, value: int, size: tuple[int, int] = (40, 40)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", size, value).save(folder / f"picture_{number:03d}.png")


def lay(folder: Path, *datasets: dict[str, Any], **options: Any) -> Path:
    write_run(folder, datasets=[PICTURES, *datasets], **options)
    return folder


def start(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert train_in_process(folder, *arguments) == code
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def weights(folder: Path) -> dict[str, numpy.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "output" / "pytorch_lora_weights.safetensors").items()}


def are_equal(one: dict[str, numpy.ndarray], other: dict[str, numpy.ndarray]) -> bool:
    return one.keys() == other.keys() and all(numpy.array_equal(one[name], other[name]) for name in one)


def test_a_white_mask_changes_nothing_and_a_black_one_teaches_nothing(tmp_path, capsys):
    start(lay(tmp_path / "plain"), capsys)
    for name, value in (("white", 255), ("black", 0)):
        add_masks(tmp_path / name / "masks", 6, value)
        said = start(lay(tmp_path / name, {**MASKS, "conditioning_type": "mask"}), capsys)
        assert "with mask of masks" in said

    assert are_equal(weights(tmp_path / "white"), weights(tmp_path / "plain"))
    assert not are_equal(weights(tmp_path / "black"), weights(tmp_path / "plain"))
    assert all(not tensor.any() for name, tensor in weights(tmp_path / "black").items() if "lokr_w2" in name)  # zero as it began


@pytest.mark.slow
def test_a_run_with_masks_resumes_to_the_same_bytes_and_a_changed_mask_is_noticed(tmp_path, capsys):
    masks = {**MASKS, "conditioning_type": "segmentation"}
    for folder in (tmp_path / "whole", tmp_path / "resumed"):
        add_masks(folder / "masks", 6, 255)
        for number in range(6):
            image = Image.new("RGB", (40, 40), (0, 0, 0))
            image.paste((0, 0, 30), (0, 0, 20 + number, 40))
            image.save(folder / "masks" / f"picture_{number:03d}.png")
    start(lay(tmp_path / "whole", masks, masked_loss_probability=0.5), capsys)
    start(lay(tmp_path / "resumed", masks, masked_loss_probability=0.5), capsys, "--max_train_steps", "3")
    said = start(tmp_path / "resumed", capsys)
    assert "resumed from checkpoint-3" in said and "changed since the checkpoint" not in said
    assert are_equal(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))

    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "resumed" / "masks" / "picture_000.png")
    said = start(tmp_path / "resumed", capsys, "--max_train_steps", "7")
    assert "dataset 'masks': 1 changed; 1 to encode" in said and "changed since the checkpoint" in said


def test_pictures_without_a_usable_mask_are_skipped_and_named(tmp_path, capsys):
    add_masks(tmp_path / "masks", 5, 255)
    add_masks(tmp_path / "odd", 1, 255, size=(40, 20))
    shutil.copy(tmp_path / "odd" / "picture_000.png", tmp_path / "masks" / "picture_000.png")
    broken = tmp_path / "masks" / "picture_001.png"
    broken.write_bytes(broken.read_bytes()[:-30])

    said = start(lay(tmp_path, {**MASKS, "conditioning_type": "mask"}), capsys)

    assert "dataset 'masks': 1 (picture_001.png) skipped, truncated" in said
    assert "dataset 'pictures': 2 (picture_001.png, picture_005.png) skipped, no companion" in said
    assert "dataset 'pictures': 1 (picture_000.png) skipped, other shape" in said
    assert "3 images in 1 bucket" in said


def test_references_are_refused_by_a_model_that_takes_none(tmp_path, capsys):
    add_masks(tmp_path / "masks", 6, 255)
    said = start(lay(tmp_path, {**MASKS, "conditioning_type": "reference_strict"}), capsys, code=2)
    assert "auraflow takes no reference pictures, but 'masks' holds some" in said


def test_a_model_that_edits_pictures_is_shown_their_references(tmp_path, capsys):
    model = build_tiny_flux2(tmp_path / "tiny")
    settings = {"model": model, "model_family": "flux2", "max_train_steps": 2}
    loose = {**MASKS, "id": "more", "conditioning_type": "reference_loose", "instance_data_dir": "more"}
    start(lay(tmp_path / "plain", **settings), capsys)
    add_pictures(tmp_path / "shown" / "masks", 6, first=20)
    for number, path in enumerate(sorted((tmp_path / "shown" / "masks").iterdir())):
        path.rename(path.with_name(f"picture_{number:03d}.png"))
    add_masks(tmp_path / "shown" / "more", 6, 90, size=(30, 90))
    said = start(lay(tmp_path / "shown", {**MASKS, "conditioning_type": "reference_strict"}, loose, **settings), capsys)
    again = start(tmp_path / "shown", capsys, "--max_train_steps", "3")

    assert "with reference_strict of masks, reference_loose of more" in said and "dataset 'masks': 6 new; 6 to encode" in said
    assert "dataset 'more': 6 new; 1 to encode" in said  # all of them are the same grey
    assert "to encode" not in again and "resumed from checkpoint-2" in again
    assert not are_equal(weights(tmp_path / "plain"), weights(tmp_path / "shown"))


def test_held_out_pictures_are_measured_and_never_trained_on(tmp_path, capsys):
    for name in ("plain", "measured", "resumed"):
        add_pictures(tmp_path / name / "others", 5, first=50)
    options = {"eval_steps_interval": 2, "num_eval_images": 3, "eval_timesteps": 5}
    start(lay(tmp_path / "plain"), capsys)
    said = start(lay(tmp_path / "measured", HELD_OUT, **options), capsys)
    start(lay(tmp_path / "resumed", HELD_OUT, **options), capsys, "--max_train_steps", "3")
    start(tmp_path / "resumed", capsys)

    assert "3 images of others at 5 noise levels, every 2 steps and at the end" in said and "step 6: held-out loss" in said
    assert "3 of its 5 images are evaluated with" in said and "dataset 'others': 5 new; 3 to encode" in said
    assert are_equal(weights(tmp_path / "plain"), weights(tmp_path / "measured"))  # looking disturbs nothing
    assert are_equal(weights(tmp_path / "plain"), weights(tmp_path / "resumed"))
    rows = [json.loads(line) for line in (tmp_path / "measured" / "output" / "evaluation.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (tmp_path / "resumed" / "output" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and len({row["loss/val/others"] for row in rows}) == 4
    assert [row for row in again if row["step"] != 3] == rows  # step 3 was the last one of the first part
    assert {"loss/val/others/noise_0-25", "loss/val/others/noise_75-100"} <= rows[0].keys()


def test_options_of_evaluation_without_held_out_pictures_are_named(tmp_path, capsys):
    said = start(lay(tmp_path, num_eval_images=1), capsys, "--max_train_steps", "1")
    assert "num_eval_images without effect: no dataset has dataset_type eval" in said
    said = start(lay(tmp_path, num_eval_images=1, eval_dataset_id="others"), capsys, code=2)
    assert "eval_dataset_id 'others' is not there" in said
