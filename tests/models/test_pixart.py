from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from simpletuner.errors import ConfigError
from simpletuner.models.families.pixart import PixArt
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised
from tests.builders.pixart import build_tiny_pixart, build_tiny_pixart_alpha
from tests.builders.pixels import build_foreign_t5

CPU = torch.device("cpu")
CALL = {"width": 48, "height": 32, "num_inference_steps": 2, "guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pixart(tmp_path_factory.mktemp("models") / "pixart")


def family(folder: Path, **options: Any) -> PixArt:
    return PixArt(Models(model_family="pixart", pretrained_model_name_or_path=str(folder), **{"tokenizer_max_length": 24, **options}))


def batch_of(built: PixArt, captions: list[str]) -> Batch:
    return Batch((), tuple(captions), {}, built.encode_text(built.load_text_encoders(CPU, torch.float32), captions))


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_taken_on_the_prediction_and_not_on_the_variance(folder, prediction):
    built = family(folder)
    denoiser, batch = built.load_denoiser(torch.float32, 0), batch_of(built, ["a cat", "a dog"])
    latents, noise = torch.randn(2, 2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([3, 700])

    noised = built.process(Diffusion(prediction_type=prediction)).add_noise(latents, noise, steps / 1000)
    ours = ((built.predict(denoiser, noised, batch) - noised.target) ** 2).mean((1, 2, 3))

    scheduler = DDPMScheduler.from_config(built.source.part("scheduler").config(), prediction_type=prediction)
    sizes = {"resolution": None, "aspect_ratio": None}
    text = {"encoder_hidden_states": batch.text["prompt"], "encoder_attention_mask": batch.text["mask"]}
    answer = denoiser(scheduler.add_noise(latents, noise, steps), **text, timestep=steps, added_cond_kwargs=sizes).sample
    assert answer.shape[1] == 2 * latents.shape[1]
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    theirs = ((answer.chunk(2, dim=1)[0] - target) ** 2).mean((1, 2, 3))
    assert float(((ours - theirs).abs() / theirs).max()) < 1e-6


@torch.no_grad()
def test_an_alpha_is_told_sizes_and_reads_fewer_tokens(tmp_path):
    folder = build_tiny_pixart_alpha(tmp_path / "alpha")
    built, pipeline = family(folder), PixArtAlphaPipeline.from_pretrained(folder)
    calls: list[Any] = []
    pipeline.transformer.register_forward_hook(lambda module, args, named, output: calls.append((args, named, output[0])), with_kwargs=True)
    pipeline("a cat", **CALL, output_type="latent", max_sequence_length=24, generator=torch.Generator().manual_seed(0))
    (seen,), named, answered = calls[0]

    answer = built.predict(pipeline.transformer, Noised(seen, seen, named["timestep"] / 1000), batch_of(built, ["a cat"]))

    assert torch.equal(answer, answered[:, :4]) and named["added_cond_kwargs"]["resolution"].tolist() == [[32.0, 48.0]]
    assert built.pipeline_class == "PixArtAlphaPipeline" and family(folder, tokenizer_max_length=None).text_tokens == 120


@torch.no_grad()
def test_a_model_of_the_time_before_its_class_is_trained_and_written_so_that_diffusers_loads_it(folder, tmp_path):
    """The lists of parts of the released models name Transformer2DModel, which diffusers has split since."""
    old = shutil.copytree(folder, tmp_path / "old")
    for file, key in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        content = json.loads((old / file).read_text())
        content[key] = ["diffusers", "Transformer2DModel"] if key == "transformer" else "Transformer2DModel"
        (old / file).write_text(json.dumps(content | ({"num_vector_embeds": None} if key == "_class_name" else {})))
    built = family(old)
    built.check_source()
    denoiser = built.load_denoiser(torch.float32, 0)
    denoiser.proj_out.bias += 1

    built.save_pipeline(denoiser, tmp_path / "new")

    loaded = PixArtSigmaPipeline.from_pretrained(tmp_path / "new").transformer
    assert isinstance(loaded, PixArtTransformer2DModel) and torch.equal(loaded.proj_out.bias, denoiser.proj_out.bias)
    assert family(folder, model_init="random").load_denoiser(torch.float32, 0).proj_out.bias.shape == denoiser.proj_out.bias.shape


def test_the_flavours_are_sigmas_and_say_which_are_stages():
    (note, hint) = PixArt(Models(model_family="pixart", model_flavour="900M-1024-v0.7-stage2")).objective_notes(Diffusion())

    assert "the less noisy steps" in note and "refiner_training" in hint
    assert PixArt(Models(model_family="pixart")).objective_notes(Diffusion()) == []
    assert PixArt(Models(model_family="pixart")).text_tokens == 300


def test_a_t5_of_another_width_is_refused_by_the_key_that_says_it(folder, tmp_path):
    wide = build_foreign_t5(tmp_path / "wide", width=64)

    with pytest.raises(ConfigError, match="64 numbers wide, and the denoiser takes 32") as caught:
        family(folder, pretrained_t5_model_name_or_path=str(wide)).check_source()

    assert "caption_channels" in caught.value.hint
