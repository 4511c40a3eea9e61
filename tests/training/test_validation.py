"""Pictures that fail, or that a signal cuts short, cost no step of the training; those that are missing come at the next start."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.training.prompts import file_name_of
from simpletuner.training.validation import Renderer, step_of
from tests.builders.run import adapter_bytes, train_in_process, write_run

LOOKING = {
    "validation_prompt": "a picture",
    "validation_resolution": "32",
    "validation_num_inference_steps": 3,
    "validation_step_interval": 3,
    "checkpoint_step_interval": 0,
    "disable_benchmark": True,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def picture(folder: Path, step: int) -> Path:
    return folder / "output" / "validation_images" / f"step_{step:05d}_validation_7_32x32.png"


def at_call(monkeypatch, number: int, act: Callable[[], None]) -> None:
    """Do something at the beginning of the n-th picture, counted from 1, which is then rendered for real."""
    render, calls = Renderer._render_one, []

    def wrapped(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            act()
        return render(self, *arguments)

    monkeypatch.setattr(Renderer, "_render_one", wrapped)


@pytest.mark.parametrize(("number", "step"), [(1, 3), (2, 6)], ids=["in the middle", "at the end"])
def test_a_signal_ends_the_pictures_and_the_next_start_begins_with_them(tmp_path, monkeypatch, capsys, number, step):
    write_run(tmp_path / "whole", **LOOKING)
    assert train_in_process(tmp_path / "whole") == 0
    write_run(tmp_path / "stopped", **LOOKING)

    with monkeypatch.context() as patch:
        at_call(patch, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_in_process(tmp_path / "stopped") == 143
    assert (tmp_path / "stopped" / "output" / f"checkpoint-{step}").is_dir() and not picture(tmp_path / "stopped", step).exists()
    assert train_in_process(tmp_path / "stopped") == 0

    for label in (3, 6):
        assert picture(tmp_path / "stopped", label).read_bytes() == picture(tmp_path / "whole", label).read_bytes()
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")


def test_pictures_that_are_there_are_not_rendered_again(tmp_path, capsys):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path) == 0
    capsys.readouterr()

    assert train_in_process(tmp_path) == 0

    assert "pictures step" not in capsys.readouterr().out


def test_a_picture_for_which_memory_is_short_is_tried_again_or_named_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    two = {**LOOKING, "num_validation_images": 2, "report_to": "jsonl"}
    write_run(tmp_path / "whole", **two)
    assert train_in_process(tmp_path / "whole") == 0
    write_run(tmp_path / "short", **two)
    calls: list[int] = []
    render = Renderer._render_one

    def short(self, pipeline, strength, shown):
        calls.append(shown.seed)
        if len(calls) in (1, 4, 5):  # once with the first picture of step 3, twice with the first of step 6
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return render(self, pipeline, strength, shown)

    monkeypatch.setattr(Renderer, "_render_one", short)
    assert train_in_process(tmp_path / "short") == 0

    first, second = calls[0], calls[2]
    assert calls == [first, first, second, first, first, second]
    folders = {name: tmp_path / name / "output" / "validation_images" for name in ("whole", "short")}
    names = {name: {path.name for path in folder.glob("step_*.png")} for name, folder in folders.items()}
    lost = next(name for name in names["whole"] if name.startswith("step_00006") and f"_{first}_" in name)
    assert names["short"] == names["whole"] - {lost, "step_00006_grid.png"}
    assert all((folders["short"] / name).read_bytes() == (folders["whole"] / name).read_bytes() for name in names["short"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"step 6 lacks picture {lost.removesuffix('.png')}: memory ran out. Set vae_enable_tiling or lower validation_resolution." in said
    assert adapter_bytes(tmp_path / "short") == adapter_bytes(tmp_path / "whole")


def test_a_vae_for_which_there_is_no_room_costs_the_pictures_and_not_the_run(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path, "--max_train_steps", "2", "--validation_step_interval", "0") == 0

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AuraFlow, "load_vae", fail)
    assert train_in_process(tmp_path, "--max_train_steps", "4") == 0

    assert "no pictures of step 3: memory ran out while the VAE was loaded. The training goes on" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "output" / "checkpoint-4").is_dir()


def test_pictures_that_fail_before_the_first_step_end_the_run_while_nothing_is_lost(tmp_path, monkeypatch):
    write_run(tmp_path, **{**LOOKING, "disable_benchmark": False})

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Renderer, "_render_one", fail)

    assert train_in_process(tmp_path) == 4


def test_a_run_begun_anew_moves_the_pictures_of_the_one_before_aside(tmp_path):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "validation_step_interval": 4, "resume_from_checkpoint": ""}))

    assert train_in_process(tmp_path) == 0

    aside = tmp_path / "output" / "superseded-1" / "validation_images"
    assert (aside / picture(tmp_path, 3).name).is_file() and not picture(tmp_path, 3).exists()
    assert picture(tmp_path, 4).is_file()


def test_a_stop_of_a_run_begun_anew_says_how_to_continue_it(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, **LOOKING, resume_from_checkpoint="")
    at_call(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))

    assert train_in_process(tmp_path) == 130

    said = capsys.readouterr().err
    assert "--resume_from_checkpoint=latest" in said and "error" not in said


@pytest.mark.parametrize("nickname", ["七" * 300, "a/../b", "x" * 300, "é" * 99])
def test_nicknames_in_any_script_fit_a_file_name(tmp_path, nickname):
    name = file_name_of(nickname)

    (tmp_path / f"step_123456_{name}_1234567890_4096x4096.png.tmp").write_bytes(b"")
    assert name and "/" not in name


def test_pictures_by_epochs_in_another_format_say_what_they_are(tmp_path):
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"fox": {"prompt": "ein Fuchs, \u043b\u0438\u0441\u0430", "num_inference_steps": 2, "lycoris_strength": 0.5}}))
    looks = {**LOOKING, "validation_step_interval": 0, "validation_epoch_interval": 1, "validate_after_step": 2, "user_prompt_library": str(library)}
    write_run(tmp_path, **{**looks, "validation_image_format": "jpg", "disable_benchmark": False})

    assert train_in_process(tmp_path) == 0

    folder = tmp_path / "output" / "validation_images"
    steps = sorted({step_of(path.name) for path in folder.glob("step_*_fox_7_32x32.jpg")})
    assert steps == [3, 6]  # of 6 pictures in batches of 2
    with Image.open(folder / f"step_{steps[-1]:05d}_fox_7_32x32.jpg") as image:
        facts = json.loads(image.getexif()[ExifTags.Base.ImageDescription])
    assert facts["prompt"] == "ein Fuchs, \u043b\u0438\u0441\u0430" and (facts["strength"], facts["inference_steps"]) == ("0.5", "2")
    with Image.open(folder / "base_fox_7_32x32.jpg") as image:
        assert json.loads(image.getexif()[ExifTags.Base.ImageDescription])["strength"] == "0"
    assert (folder / "grid.png").is_file()
