"""What is particular to the refiner of Stable Diffusion XL: what it is told, at which steps, and from which pictures it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps

from simpletuner.cli.choices import family_defaults
from simpletuner.cli.main import main
from simpletuner.errors import ConfigError
from simpletuner.models.families.sdxl import StableDiffusionXL
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from simpletuner.types import Batch, Crop, Geometry, Sample, Size
from tests.builders.run import train_in_process, write_run
from tests.builders.single_file import write_refiner
from tests.training.families import family, model, options_of, pipeline_of

NAME = "sdxl-refiner"
LOOKING = {
    "validation_prompt": "a cat",
    "validation_negative_prompt": "blurry",
    "validation_num_inference_steps": 4,
    "validation_seed": 11,
    "validation_resolution": "32x48",
    "max_train_steps": 2,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write_refiner_run(folder: Path, **options: Any) -> Path:
    return write_run(folder, **{**options_of(NAME), "validation_start_image": None, **LOOKING, **options})


def render(prompt: str, start: Image.Image) -> numpy.ndarray:
    """What the plain pipeline makes of a picture as validation does."""
    cut = ImageOps.fit(start, (32, 48), Image.Resampling.LANCZOS)
    arguments = {"guidance_scale": 5.0, "aesthetic_score": 7.0, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(11)}
    image = pipeline_of(NAME)(prompt, negative_prompt="blurry", image=cut, strength=0.5, **arguments).images[0]
    return numpy.asarray(image).astype(int)


def shown(file: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(file).convert("RGB")).astype(int)


@torch.no_grad()
def test_the_loss_is_that_of_diffusers_formulas_with_a_score_in_place_of_the_size():
    built = family(NAME)
    sample = Sample("pictures", "a.png", "00", Geometry(Size(100, 80), Size(40, 32), Crop(5, 0, 32, 32)), ("a cat",))
    text = built.encode_text(built.load_text_encoders(torch.device("cpu"), torch.float32), ["a cat", "a dog"])
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet, steps = built.load_denoiser(torch.float32, 0), torch.tensor([3, 150])

    noised = built.process(Diffusion()).add_noise(latents, noise, steps / 1000)
    ours = ((built.predict(unet, noised, Batch((sample, sample), ("a cat", "a dog"), {}, text)) - noised.target) ** 2).mean((1, 2, 3))

    scheduler = DDPMScheduler.from_config(built.source.part("scheduler").config())
    added = {"time_ids": torch.tensor([[80.0, 100, 0, 5, 7.0]] * 2), "text_embeds": text["pooled"]}
    answer = unet(scheduler.add_noise(latents, noise, steps), steps, text["prompt"], added_cond_kwargs=added).sample
    theirs = ((answer - noise) ** 2).mean((1, 2, 3))
    assert float(((ours - theirs).abs() / theirs).max()) < 1e-6


def test_a_refiner_is_known_by_its_flavour_or_by_what_it_lacks(tmp_path):
    assert family(NAME).is_refiner and not family("sdxl").is_refiner
    assert StableDiffusionXL(Models(model_family="sdxl", model_flavour="refiner-0.9")).is_refiner
    by_name = Models(model_family="sdxl", pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-refiner-1.0")
    assert StableDiffusionXL(by_name).pipeline_class == "StableDiffusionXLImg2ImgPipeline"
    assert not StableDiffusionXL(Models(model_family="sdxl", pretrained_model_name_or_path=str(tmp_path / "nowhere"))).is_refiner


@pytest.mark.parametrize(("name", "flavour"), [("sdxl", "refiner-1.0"), (NAME, "base-1.0")])
def test_a_flavour_that_a_folder_is_not_is_refused(name, flavour):
    chosen = StableDiffusionXL(Models(model_family="sdxl", pretrained_model_name_or_path=str(model(name)), model_flavour=flavour))

    with pytest.raises(ConfigError, match=f"model_flavour {flavour} does not fit"):
        chosen.check_source()


def test_a_refiner_without_a_vae_is_not_given_one_back():
    plain, pixels = (
        StableDiffusionXL(Models(model_family="sdxl", model_flavour="refiner-1.0", pretrained_vae_model_name_or_path=vae)) for vae in (None, "none")
    )

    assert plain.parts == ("text_encoder_2", "tokenizer_2", "vae", "unet", "scheduler")
    assert pixels.parts == ("text_encoder_2", "tokenizer_2", "unet", "scheduler")
    assert StableDiffusionXL.parts[0] == "text_encoder" and StableDiffusionXL.text_parts[0] == ("text_encoder", "tokenizer")


def test_its_flavours_are_trained_at_the_least_noisy_fifth_and_a_folder_says_that_it_is_not():
    assert family_defaults("sdxl", "refiner-1.0")["refiner_training"] and "refiner_training" not in family_defaults("sdxl", "base-1.0")

    assert any("refiner_training" in note for note in family(NAME).objective_notes(Diffusion()))
    assert family(NAME).objective_notes(Diffusion(refiner_training=True)) == []


def test_validation_starts_from_the_first_pictures_of_the_datasets_and_generate_from_one_that_is_named(tmp_path, capfd):
    (tmp_path / "prompts.json").write_text(json.dumps({"dog": "a dog"}))
    write_refiner_run(tmp_path, user_prompt_library="prompts.json")
    assert train_in_process(tmp_path) == 0
    assert "--adapter output --image input.png\n" in capfd.readouterr().out
    starts = [Image.open(file).convert("RGB") for file in sorted((tmp_path / "pictures").glob("*.png"))]
    made = tmp_path / "output" / "validation_images"

    assert numpy.abs(shown(made / "base_validation_11_32x48.png") - render("a cat", starts[0])).max() <= 1
    assert numpy.abs(shown(made / "base_dog_11_32x48.png") - render("a dog", starts[1])).max() <= 1

    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        words = ["generate", "a cat", "--adapter", "output", "--pretrained_model_name_or_path", "model", "--output", "made"]
        assert main(words) == 2
        assert "--image" in capfd.readouterr().err
        assert main([*words, "--image", "pictures/picture_000.png"]) == 0
    finally:
        os.chdir(before)
    (file,) = (tmp_path / "made").glob("*.png")
    assert numpy.abs(shown(file) - shown(made / "step_00002_validation_11_32x48.png")).max() <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"validation_num_inference_steps": 1}, "Set it to 2 or more"),
        ({"validation_start_image": "nowhere.png"}, "validation_start_image nowhere.png does not exist"),
        ({"validation_start_image": "model"}, "holds no picture"),
    ],
)
def test_what_leaves_it_nothing_to_do_or_to_start_from_is_refused_before_anything_is_loaded(tmp_path, capfd, options, said):
    write_refiner_run(tmp_path, **options)

    for arguments in (["--dry-run"], []):
        assert train_in_process(tmp_path, *arguments) == 2
        assert said in " ".join(capfd.readouterr().err.split()) and not (tmp_path / "cache").exists()


def test_the_lines_that_a_run_ends_with_improve_a_picture(tmp_path, capfd, monkeypatch):
    write_refiner_run(tmp_path, lora_type="standard", lycoris_config=None, validation_start_image="pictures/picture_002.png")
    assert train_in_process(tmp_path) == 0

    monkeypatch.chdir(tmp_path)
    commands, _, lines = capfd.readouterr().out.partition("Use it with diffusers:")
    exec(lines, {})

    rendered = shown(tmp_path / "picture.png")
    assert numpy.abs(shown(tmp_path / "output" / "validation_images" / "step_00002_validation_11_32x48.png") - rendered).max() <= 1
    assert "generate 'a cat' --adapter output\n" in commands


def test_a_refiner_in_one_file_is_the_model_of_its_folder(tmp_path):
    file = write_refiner(model(NAME), tmp_path / "one.safetensors")
    options = Models(model_family="sdxl", pretrained_model_name_or_path=str(file), single_file_base_model=str(model(NAME)))
    found, known = StableDiffusionXL(options), family(NAME)
    found.check_source()

    cpu = torch.device("cpu")
    networks = [[one.load_denoiser(torch.float32, 0), one.load_text_encoders(cpu, torch.float32)[0].encoder] for one in (found, known)]

    for ours, theirs in zip(*networks):
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert found.is_refiner and any("text_encoder_2" in note and "tokenizer_2" in note for note in found.notes())
