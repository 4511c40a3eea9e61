"""Whole runs from a model in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders.run import train_in_process, write_run
from tests.builders.single_file import write_auraflow, write_sd1, write_sdxl
from tests.training.families import TINY, model

MARKS = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
WRITERS = {"auraflow": write_auraflow, "sd1x": write_sd1, "sdxl": write_sdxl}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run_of(folder: Path, name: str, **options) -> Path:
    """A run of two steps whose folder `model` is the tiny model of the family."""
    options = {"tokenizer_max_length": TINY[name].tokenizer_max_length, "max_train_steps": 2, **options}
    return write_run(folder, model=model(name), model_family=name, **options)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "output" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", WRITERS)
def test_training_from_a_single_file_is_training_from_the_folder(tmp_path, name):
    run_of(tmp_path / "folder", name)
    run_of(tmp_path / "file", name, pretrained_model_name_or_path="one.safetensors", single_file_base_model="model")
    WRITERS[name](model(name), tmp_path / "file" / "one.safetensors")

    assert train_in_process(tmp_path / "folder") == train_in_process(tmp_path / "file") == 0

    learned, same = adapter(tmp_path / "folder"), adapter(tmp_path / "file")
    assert all(torch.equal(same[key], learned[key]) for key in learned) and same.keys() == learned.keys()


def test_a_file_of_velocity_is_trained_as_the_folder_that_says_so(tmp_path, capfd):
    velocity = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    run_of(tmp_path / "folder", "sdxl", **velocity)
    run_of(tmp_path / "file", "sdxl", pretrained_model_name_or_path="one.safetensors", single_file_base_model="model")
    write_sdxl(model("sdxl"), tmp_path / "file" / "one.safetensors", **MARKS)

    assert train_in_process(tmp_path / "folder") == train_in_process(tmp_path / "file") == 0

    learned, same = adapter(tmp_path / "folder"), adapter(tmp_path / "file")
    assert all(torch.equal(same[key], learned[key]) for key in learned)
    said = capfd.readouterr().out
    assert 'one.safetensors sets prediction_type "v_prediction", rescale_betas_zero_snr true' in " ".join(said.split())


def test_a_contradiction_to_the_file_is_said_and_the_option_holds(tmp_path, capfd):
    options = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    run_of(tmp_path, "sdxl", pretrained_model_name_or_path="one.safetensors", single_file_base_model="model", **options)
    write_sdxl(model("sdxl"), tmp_path / "one.safetensors", **MARKS)

    assert train_in_process(tmp_path, "--dry-run") == 0

    said = " ".join(capfd.readouterr().out.split())
    assert 'prediction_type "epsilon" is trained, though one.safetensors says "v_prediction" of itself' in said
    assert "rescale_betas_zero_snr false is trained, though" in said


def test_all_weights_can_be_trained_from_a_file_and_come_out_as_a_folder(tmp_path):
    run_of(tmp_path, "sd1x", pretrained_model_name_or_path="one.safetensors", single_file_base_model="model", model_type="full", lora_type=None)
    write_sd1(model("sd1x"), tmp_path / "one.safetensors")

    assert train_in_process(tmp_path) == 0

    index = json.loads((tmp_path / "output" / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    vae = "vae/diffusion_pytorch_model.safetensors"
    saved, original = load_file(tmp_path / "output" / "pipeline" / vae), load_file(model("sd1x") / vae)
    assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in saved)


def lora(path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 4)}, path)


def cut_short(path: Path) -> None:
    whole = write_sd1(model("sd1x"), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD = {
    "an adapter": (lora, {}, "one.safetensors is an adapter", "init_lora"),
    "cut short": (cut_short, {}, "is not a whole safetensors file", "Download it again"),
    "another family": (lambda path: write_auraflow(model("auraflow"), path), {}, "is an AuraFlow transformer", "Set model_family to auraflow"),
    "nothing": (lambda path: None, {}, "one.safetensors does not exist", "Check the path"),
    "no VAE": (
        lora,
        {"pretrained_model_name_or_path": "model", "pretrained_vae_model_name_or_path": "one.safetensors"},
        "holds no VAE: it is an adapter",
        "pretrained_vae_model_name_or_path",
    ),
    "a flavour that is none": (lora, {"model_flavour": "base-1"}, "sdxl has no flavour 'base-1'", "did you mean 'base-1.0'?"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_a_dry_run_as_by_a_run(tmp_path, name, capfd):
    write, options, message, hint = BAD[name]
    run_of(tmp_path, "sdxl", **{"pretrained_model_name_or_path": "one.safetensors", "single_file_base_model": "model", **options})
    write(tmp_path / "one.safetensors")

    for arguments in (["--dry-run"], []):
        assert train_in_process(tmp_path, *arguments) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert message in said and hint in said


def test_a_folder_of_another_family_is_named(tmp_path, capfd):
    write_run(tmp_path, model=model("sd3"), model_family="sdxl", tokenizer_max_length=None)

    assert train_in_process(tmp_path, "--dry-run") == 2

    said = " ".join(capfd.readouterr().err.split())
    assert "model is a StableDiffusion3Pipeline, and model_family sdxl needs a StableDiffusionXLPipeline" in said
    assert "It looks like model_family sd3." in said


def test_a_pipeline_for_more_than_text_is_said_to_be_one(tmp_path, capfd):
    write_run(tmp_path, model=model("sdxl"), model_family="sdxl", tokenizer_max_length=None)
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"))

    assert train_in_process(tmp_path, "--dry-run") == 2

    said = " ".join(capfd.readouterr().err.split())
    assert "model is a StableDiffusionXLImg2ImgPipeline, and model_family sdxl needs a StableDiffusionXLPipeline" in said
    assert "makes pictures from more than text" in said
