"""`simpletuner compare`: checkpoints side by side, from the same seeds, each picture rendered once."""

from __future__ import annotations

import json
import os

import numpy
import pytest
from PIL import Image

from simpletuner.cli.main import main
from simpletuner.training.checkpoint_grid import Cell, Column, is_there, pictures_within
from simpletuner.training.prompts import Picture
from simpletuner.training.validation import write_picture
from simpletuner.types import Size
from tests.builders.report import content_in
from tests.builders.run import train_in_process, write_run

LOOKING = {
    "validation_prompt": "a <b>picture</b>",
    "validation_resolution": "32",
    "validation_num_inference_steps": 1,
    "validation_step_interval": 2,
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "disable_benchmark": False,
}


def compare(folder, *words: str) -> int:
    before = os.getcwd()
    os.chdir(folder)
    try:
        return main(["compare", "output", "--pretrained_model_name_or_path", str(folder / "model"), *words])
    finally:
        os.chdir(before)


def pixels(path) -> list:
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB")).tolist()


def test_checkpoints_are_laid_side_by_side_as_validation_showed_them_and_are_rendered_once(tmp_path, capsys):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path) == 0
    (tmp_path / "output/evaluation.jsonl").write_text('{"step": 2, "loss/val/a": 1.0}\n{"step": 4, "loss/val/a": 2.0}\n')
    capsys.readouterr()

    assert compare(tmp_path, "--strength", "0.5,1") == 0

    said = capsys.readouterr().out
    assert "5, 5 to render" in said and "best by held-out loss: checkpoint-2 (1.0000)" in said
    shown, made = tmp_path / "output/validation_images", tmp_path / "output/compare"
    stem = next(shown.glob("base_[!g]*.png")).name.removeprefix("base_")
    for ours, theirs in ((f"base_{stem}", f"base_{stem}"), *((f"checkpoint-{n}_strength_1_{stem}", f"step_0000{n}_{stem}") for n in (2, 4))):
        assert pixels(made / ours) == pixels(shown / theirs)
    content = content_in((tmp_path / "output/compare.html").read_text(encoding="utf-8"))
    assert [column["name"] for column in content["columns"] if column["is_best"]] == ["checkpoint-2"]
    assert sorted(content["prompts"][0]["pictures"]) == ["base", "checkpoint-2 0.5", "checkpoint-2 1", "checkpoint-4 0.5", "checkpoint-4 1"]
    with Image.open(tmp_path / "output/compare.png") as sheet:
        assert sheet.width > 5 * 32
    (made / f"checkpoint-2_strength_1_{stem}").unlink()

    assert compare(tmp_path, "--strength", "1", "--checkpoints", "2,4") == 0

    assert "3, 1 to render" in capsys.readouterr().out
    assert compare(tmp_path, "--checkpoints", "3") == 2
    assert "there is no checkpoint-3 in output" in capsys.readouterr().err


def test_a_picture_of_other_settings_or_of_an_older_checkpoint_is_made_again(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    weights = tmp_path / "checkpoint-2/pytorch_lora_weights.safetensors"
    weights.write_bytes(b"")
    picture = Picture("a", "a picture", "", Size(8, 8), 1)
    cell = Cell(Column("checkpoint-2", tmp_path / "checkpoint-2", 2), 1.0, picture, tmp_path / "a.png")
    assert not is_there(cell, {"seed": "1"})
    write_picture(cell.file, Image.new("RGB", (8, 8)), {"seed": "1"})

    assert is_there(cell, {"seed": "1"}) and not is_there(cell, {"seed": "2"})
    later = cell.file.stat().st_mtime + 5
    os.utime(weights, (later, later))
    assert not is_there(cell, {"seed": "1"})


def test_a_folder_without_checkpoints_is_named(tmp_path, capsys):
    (tmp_path / "output").mkdir()

    assert compare(tmp_path) == 2

    assert "there is no checkpoint in output" in capsys.readouterr().err


@pytest.mark.parametrize(("room", "longest_px"), [(10_000_000, 448), (40_000, 224), (1, 96)])
def test_pictures_are_made_as_small_as_it_takes(tmp_path, room, longest_px):
    for number in range(2):
        Image.effect_noise((500, 400), 90).convert("RGB").save(tmp_path / f"{number}.png")

    data, found = pictures_within(sorted(tmp_path.glob("*.png")), room)

    assert found == longest_px and json.dumps(list(data.values())).count("data:image/webp") == 2
