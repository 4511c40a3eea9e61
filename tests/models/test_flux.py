from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxPipeline

from simpletuner.models.families.flux import Flux
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from simpletuner.options.validation import Validation
from simpletuner.types import Batch, Noised
from tests.builders.flux import build_tiny_flux

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("models") / "flux")


def flux(folder: Path, **options: Any) -> Flux:
    return Flux(Models(model_family="flux", pretrained_model_name_or_path=str(folder), tokenizer_max_length=24, **options))


def test_padding_is_hidden_where_the_base_was_trained_so_and_where_it_is_asked_for(tiny):
    def hides(**options: Any) -> bool:
        return Flux(Models(model_family="flux", **options)).hides_padding

    assert hides(model_flavour="libreflux") and hides(flux_attention_masked_training=True)
    assert not hides() and not hides(model_flavour="schnell")
    assert flux(tiny).text_fingerprint() != flux(tiny, flux_attention_masked_training=True).text_fingerprint()


@pytest.mark.parametrize("is_hidden", [True, False])
def test_padding_makes_a_difference_unless_it_is_hidden(tiny, is_hidden):
    family = flux(tiny, flux_attention_masked_training=is_hidden)
    denoiser = family.load_denoiser(torch.float32, 0)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = family.encode_text(family.load_text_encoders(CPU, torch.float32), ["a cat"])

    def answer(changed: slice) -> torch.Tensor:
        prompt = text["prompt"].clone()
        prompt[:, changed] += 1.0
        noised = Noised(latents, latents, torch.tensor([0.5]), guidance=torch.ones(1))
        return family.predict(denoiser, noised, Batch((), ("a cat",), {}, {**text, "prompt": prompt}))

    with torch.no_grad():
        plain, padding, word = answer(slice(0, 0)), answer(slice(6, 24)), answer(slice(5, 6))

    assert torch.equal(plain, padding) == is_hidden
    assert not torch.allclose(plain, word, atol=1e-5)


@torch.no_grad()
def test_a_picture_with_hidden_padding_is_that_of_diffusers_with_an_attention_mask(tiny):
    family = flux(tiny, flux_attention_masked_training=True)
    text = family.encode_text(family.load_text_encoders(CPU, torch.float32), ["a cat"])
    call = {"width": 32, "height": 48, "num_inference_steps": 2, "output_type": "np"}
    plain = FluxPipeline.from_pretrained(tiny)
    seen = torch.tensor([True] * 6 + [False] * 18 + [True] * 24)[None, None, None]  # with the end token; 4 x 6 tokens of the image

    def render(pipeline: Any, **arguments: Any) -> numpy.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**arguments, **call, generator=torch.Generator().manual_seed(3)).images

    ours = family.pipeline(family.load_denoiser(torch.float32, 0), family.load_vae(CPU, torch.float32), Diffusion())
    expected = render(plain, prompt="a cat", max_sequence_length=24, joint_attention_kwargs={"attention_mask": seen})
    unmasked = render(plain, prompt="a cat", max_sequence_length=24)

    assert numpy.array_equal(render(ours, **family.pipeline_inputs(text, text)), expected)
    assert not numpy.allclose(expected, unmasked, atol=1e-3)


@pytest.mark.parametrize("is_hidden", [True, False])
@torch.no_grad()
def test_real_guidance_is_that_of_diffusers_and_each_prompt_hides_its_own_padding(tiny, is_hidden):
    family = flux(tiny, flux_attention_masked_training=is_hidden)
    encoders = family.load_text_encoders(CPU, torch.float32)
    text, negative = (family.encode_text(encoders, [prompt]) for prompt in ("a cat", "blurry, cropped and ugly"))
    pipeline = family.pipeline(family.load_denoiser(torch.float32, 0), family.load_vae(CPU, torch.float32), Diffusion())
    call = {"width": 32, "height": 48, "num_inference_steps": 2, "output_type": "np"}

    def render(pipeline: Any, **arguments: Any) -> numpy.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**arguments, **call, generator=torch.Generator().manual_seed(3)).images

    def ours(real: float) -> numpy.ndarray:
        options = Validation(validation_guidance=3.5, validation_guidance_real=real)
        return render(pipeline, **family.pipeline_inputs(text, negative), **family.guidance_arguments(options))

    guided, unguided = ours(4.0), ours(1.0)

    assert not numpy.allclose(guided, unguided, atol=1e-3)
    plain = FluxPipeline.from_pretrained(tiny)
    words = {"prompt": "a cat", "negative_prompt": "blurry, cropped and ugly", "max_sequence_length": 24, "guidance_scale": 3.5}
    expected = render(plain, **words, true_cfg_scale=4.0)
    assert numpy.array_equal(guided, expected) != is_hidden
    if is_hidden:  # the answer to each prompt does not depend on what stands in its padding
        changed = {**negative, "prompt": negative["prompt"] + (1 - negative["mask"])[..., None]}
        options = Validation(validation_guidance=3.5, validation_guidance_real=4.0)
        again = render(pipeline, **family.pipeline_inputs(text, changed), **family.guidance_arguments(options))
        assert numpy.array_equal(again, guided)


def test_a_flavour_that_is_told_no_guidance_says_so(tmp_path):
    def idle(**options: Any) -> dict[str, str]:
        return dict(Flux(Models(model_family="flux", **options)).idle)

    untold = build_tiny_flux(tmp_path / "untold", guidance_embeds=False)
    for options in ({"model_flavour": "schnell"}, {"pretrained_model_name_or_path": str(untold)}):
        assert "told no guidance" in idle(**options)["distilled_guidance"]
    assert "distilled_guidance" not in idle(model_flavour="dev")
