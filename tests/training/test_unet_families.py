"""Stable Diffusion 1.x and XL from end to end: trained, resumed, validated, and loaded by diffusers, on tiny models."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from lycoris import create_lycoris_from_weights
from PIL import Image

from simpletuner.cli.choices import family_of
from simpletuner.models.families.sdxl import size_conditioning
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from simpletuner.types import Batch, Crop, Geometry, Sample, Size
from tests.builders.run import adapter_bytes, train_in_process, write_run
from tests.builders.stable_diffusion import build_tiny_sd1, build_tiny_sdxl

CPU = torch.device("cpu")
LOOKING = {"validation_prompt": "a cat", "validation_resolution": "32x48", "validation_num_inference_steps": 2}
LOOKING |= {"validation_seed": 11, "validation_negative_prompt": "blurry"}
PIPELINES = {"sd1x": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@functools.cache
def model(family: str, **schedule) -> Path:
    build = {"sd1x": build_tiny_sd1, "sdxl": build_tiny_sdxl}[family]
    return build(Path(tempfile.mkdtemp(prefix=f"tiny-{family}-")), **schedule)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(params=PIPELINES)
def name(request) -> str:
    return request.param


def pipeline_of(name: str, folder: Path):
    pipeline = PIPELINES[name].from_pretrained(folder, safety_checker=None) if name == "sd1x" else PIPELINES[name].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def family(name: str):
    return family_of(name)(Models(model_family=name, pretrained_model_name_or_path=str(model(name))))


def batch_of(name: str, captions: list[str]) -> Batch:
    built = family(name)
    geometry = Geometry(Size(100, 80), Size(40, 32), Crop(5, 0, 32, 32))
    samples = tuple(Sample("pictures", f"{number}.png", "00", geometry, (caption,)) for number, caption in enumerate(captions))
    text = built.encode_text(built.load_text_encoders(CPU, torch.float32), captions)
    latents = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(samples, tuple(captions), {"mean": latents, "std": torch.zeros_like(latents)}, text)


@torch.no_grad()
def test_text_is_encoded_as_the_pipeline_does_it(name):
    captions = ["a cat", "", "long " * 40]
    ours = batch_of(name, captions).text
    pipeline = pipeline_of(name, model(name))

    theirs = pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)

    assert torch.equal(ours["prompt"], theirs[0])
    if name == "sdxl":
        assert torch.equal(ours["pooled"], theirs[2])


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


@pytest.mark.parametrize(
    "options", [{}, {"lora_type": "standard", "lycoris_config": None}, {"model_type": "full", "lora_type": None, "lycoris_config": None}]
)
def test_a_resumed_run_gives_the_same_bytes(tmp_path, name, options):
    options = {"model_family": name, "tokenizer_max_length": None, "snr_gamma": 5, "offset_noise": True, "input_perturbation": 0.1, **options}
    write_run(tmp_path / "whole", model=model(name), **options)
    assert train_in_process(tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    assert train_in_process(tmp_path / "resumed") == 0

    full = Path("output") / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    if "model_type" in options:
        assert (tmp_path / "whole" / full).read_bytes() == (tmp_path / "resumed" / full).read_bytes()
    else:
        assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "resumed")


@pytest.mark.parametrize("schedule", [{}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}])
def test_validation_shows_what_diffusers_and_lycoris_render_without_us(tmp_path, name, schedule):
    if name == "sd1x" and schedule:
        pytest.skip("its sampler, PNDM, knows no zero terminal SNR")
    write_run(tmp_path, model=model(name, **schedule), model_family=name, tokenizer_max_length=None, **LOOKING)
    assert train_in_process(tmp_path) == 0

    pipeline = pipeline_of(name, model(name, **schedule))
    network, weights = create_lycoris_from_weights(1.0, str(tmp_path / "output" / "pytorch_lora_weights.safetensors"), pipeline.unet)
    for module in network.loras:
        module.bypass_mode = True
    network.apply_to()
    guidance = family_of(name).defaults["validation_guidance"]
    generator = torch.Generator().manual_seed(11)
    arguments = {"width": 32, "height": 48, "num_inference_steps": 2, "guidance_scale": guidance, "generator": generator}
    image = pipeline("a cat", negative_prompt="blurry", **arguments).images[0]

    shown = Image.open(tmp_path / "output" / "validation_images" / "step_00006_validation_11_32x48.png")
    assert {key.split(".")[0] for key in weights} == {module.lora_name for module in network.loras}
    # The prompt was encoded in a batch with others, which rounds otherwise in the last bit.
    assert numpy.abs(numpy.asarray(shown).astype(int) - numpy.asarray(image).astype(int)).max() <= 1


def test_a_plain_lora_loads_in_diffusers(tmp_path, name):
    write_run(tmp_path, model=model(name), model_family=name, tokenizer_max_length=None, lora_type="standard", lycoris_config=None, **LOOKING)
    assert train_in_process(tmp_path) == 0
    pipeline = pipeline_of(name, model(name))
    before = numpy.asarray(pipeline("a cat", height=48, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(11)).images[0])

    pipeline.load_lora_weights(tmp_path / "output")

    guidance = family_of(name).defaults["validation_guidance"]
    generator = torch.Generator().manual_seed(11)
    arguments = {"width": 32, "height": 48, "num_inference_steps": 2, "guidance_scale": guidance, "generator": generator}
    image = numpy.asarray(pipeline("a cat", negative_prompt="blurry", **arguments).images[0])
    shown = numpy.asarray(Image.open(tmp_path / "output" / "validation_images" / "step_00006_validation_11_32x48.png"))
    assert not numpy.array_equal(image, before)
    assert numpy.abs(image.astype(int) - shown.astype(int)).max() <= 1


def test_zero_terminal_snr_is_refused_where_the_noise_is_predicted(tmp_path, name, capfd):
    write_run(tmp_path, model=model(name), model_family=name, tokenizer_max_length=None, rescale_betas_zero_snr=True)

    assert train_in_process(tmp_path) == 2

    said = capfd.readouterr().err
    assert "rescale_betas_zero_snr" in said and "v_prediction" in said


def test_options_of_flow_matching_are_said_to_have_no_effect(tmp_path, name, capfd):
    write_run(tmp_path, model=model(name), model_family=name, tokenizer_max_length=None, flow_schedule_shift=3, max_train_steps=1)

    assert train_in_process(tmp_path) == 0

    assert "flow_schedule_shift has no effect" in capfd.readouterr().out
