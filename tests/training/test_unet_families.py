"""What is particular to Stable Diffusion 1.x and XL, beyond what every family promises."""

from __future__ import annotations

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from simpletuner.models.families.sdxl import size_conditioning
from simpletuner.options.diffusion import Diffusion
from simpletuner.types import Batch, Crop, Geometry, Sample, Size
from tests.builders.run import train_in_process, write_run
from tests.training.families import family, model, pipeline_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(params=["sd1x", "sdxl"])
def name(request) -> str:
    return request.param


def batch_of(name: str, captions: list[str]) -> Batch:
    built = family(name)
    geometry = Geometry(Size(100, 80), Size(40, 32), Crop(5, 0, 32, 32))
    samples = tuple(Sample("pictures", f"{number}.png", "00", geometry, (caption,)) for number, caption in enumerate(captions))
    text = built.encode_text(built.load_text_encoders(CPU, torch.float32), captions)
    latents = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(samples, tuple(captions), {"mean": latents, "std": torch.zeros_like(latents)}, text)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_equals_that_of_the_training_script_of_diffusers(name, prediction):
    built = family(name)
    batch = batch_of(name, ["a cat", "a dog", "a bird"])
    unet = built.load_denoiser(torch.float32, 0)
    options = Diffusion(prediction_type=prediction, snr_gamma=5.0)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = batch.latents["mean"]
    steps = torch.tensor([3, 500, 999])

    noised = built.process(options).add_noise(latents, noise, steps / 1000)
    ours = ((built.predict(unet, noised, batch) - noised.target) ** 2).mean((1, 2, 3)) * noised.weight

    scheduler = DDPMScheduler.from_config(built.source.part("scheduler").config(), prediction_type=prediction)
    added = {"time_ids": torch.tensor([[80.0, 100, 0, 5, 32, 32]] * 3), "text_embeds": batch.text.get("pooled")} if name == "sdxl" else None
    answer = unet(scheduler.add_noise(latents, noise, steps), steps, batch.text["prompt"], added_cond_kwargs=added).sample
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    snr = scheduler.alphas_cumprod[steps] / (1 - scheduler.alphas_cumprod[steps])
    weight = torch.clamp(snr, max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    theirs = ((answer - target) ** 2).mean((1, 2, 3)) * weight
    assert float(((ours - theirs).abs() / theirs).max()) < 1e-6


def test_sdxl_is_told_the_size_of_the_image_and_where_it_was_cut():
    sample = Sample("pictures", "a.png", "00", Geometry(Size(100, 80), Size(40, 32), Crop(5, 0, 24, 32)), ("a cat",))

    assert size_conditioning(sample) == (80, 100, 0, 5, 32, 24)


def test_a_model_of_velocity_that_ends_in_pure_noise_is_sampled_as_its_own_pipeline_does(tmp_path):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = model("sdxl", **schedule)
    looking = {"validation_prompt": "a cat", "validation_negative_prompt": "blurry", "validation_seed": 11, "validation_resolution": "32"}
    write_run(tmp_path, model=folder, model_family="sdxl", tokenizer_max_length=None, validation_num_inference_steps=3, **looking)
    assert train_in_process(tmp_path) == 0

    arguments = {"width": 32, "height": 32, "num_inference_steps": 3, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(11)}
    image = pipeline_of("sdxl", folder)("a cat", negative_prompt="blurry", **arguments).images[0]

    shown = Image.open(tmp_path / "output" / "validation_images" / "base_validation_11_32x32.png")
    assert numpy.abs(numpy.asarray(shown).astype(int) - numpy.asarray(image).astype(int)).max() <= 1


def test_zero_terminal_snr_is_refused_where_the_noise_is_predicted(tmp_path, name, capfd):
    write_run(tmp_path, model=model(name), model_family=name, tokenizer_max_length=None, rescale_betas_zero_snr=True)

    assert train_in_process(tmp_path) == 2

    said = capfd.readouterr().err
    assert "rescale_betas_zero_snr" in said and "v_prediction" in said


def test_options_of_flow_matching_are_said_to_have_no_effect(tmp_path, name, capfd):
    write_run(tmp_path, model=model(name), model_family=name, tokenizer_max_length=None, flow_schedule_shift=3, max_train_steps=1)

    assert train_in_process(tmp_path) == 0

    assert "flow_schedule_shift has no effect" in capfd.readouterr().out


def test_another_sampler_and_rescaled_guidance_are_those_of_the_pipeline(tmp_path):
    folder = model("sdxl")
    looking = {"validation_prompt": "a cat", "validation_negative_prompt": "blurry", "validation_seed": 11, "validation_resolution": "32"}
    others = {"validation_noise_scheduler": "dpm++", "validation_guidance_rescale": 0.7, "validation_guidance": 8, "max_train_steps": 1}
    write_run(tmp_path, model=folder, model_family="sdxl", tokenizer_max_length=None, validation_num_inference_steps=4, **looking, **others)
    assert train_in_process(tmp_path) == 0

    plain = pipeline_of("sdxl", folder)
    plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
    arguments = {"width": 32, "height": 32, "num_inference_steps": 4, "guidance_scale": 8.0, "generator": torch.Generator().manual_seed(11)}
    image = plain("a cat", negative_prompt="blurry", guidance_rescale=0.7, **arguments).images[0]

    with Image.open(tmp_path / "output" / "validation_images" / "base_validation_11_32x32.png") as shown:
        assert numpy.abs(numpy.asarray(shown).astype(int) - numpy.asarray(image).astype(int)).max() <= 1
        assert (shown.text["sampler"], shown.text["guidance_rescale"]) == ("dpm++", "0.7")
