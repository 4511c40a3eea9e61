from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline

from simpletuner.errors import ConfigError
from simpletuner.models.families.sana import Sana
from simpletuner.options.models import Models
from simpletuner.types import Size
from tests.builders.sana import INSTRUCTION, build_tiny_sana

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Sana:
    folder: Path = build_tiny_sana(tmp_path_factory.mktemp("models") / "sana")
    return Sana(Models(model_family="sana", pretrained_model_name_or_path=str(folder), tokenizer_max_length=24))


def test_the_vae_gives_one_latent_without_a_spread(sana):
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = sana.load_vae(CPU, torch.float32)

    moments = sana.encode_pixels(vae, pixels)

    assert moments["mean"].shape == (2, 4, 16, 8) and sana.vae_stride == 4
    assert torch.equal(moments["mean"], vae.encode(pixels).latent) and not moments["std"].any()


def test_a_vae_that_overflows_is_named(sana):
    vae = sana.load_vae(CPU, torch.float32)

    with pytest.raises(ConfigError, match="NaN or infinite"):
        sana.encode_pixels(vae, torch.full((1, 3, 32, 32), float("nan")))


def test_a_dropped_caption_is_what_guidance_steers_away_from(sana):
    encoders = sana.load_text_encoders(CPU, torch.float32)
    pipeline = SanaPipeline.from_pretrained(sana.source_name())

    text = sana.encode_text(encoders, ["", "a cat"])

    prompt, _, negative, _ = pipeline.encode_prompt("", True, negative_prompt="", complex_human_instruction=INSTRUCTION, max_sequence_length=24)
    assert torch.allclose(text["prompt"][:1], negative, atol=1e-6) and not torch.allclose(prompt, negative, atol=1e-3)
    assert not torch.allclose(text["prompt"][1], text["negative"][1], atol=1e-3)


def test_captions_of_as_many_tokens_as_are_counted_are_not_cut(sana):
    encoders = sana.load_text_encoders(CPU, torch.float32)
    fits, other, longer = "c" * 22, "c" * 21 + "d", "c" * 22 + "d"

    prompts = sana.encode_text(encoders, [fits, other, longer])["prompt"]

    assert sana.count_tokens(encoders, [fits, other, longer]) == [24, 24, 25]
    assert torch.equal(prompts[0], prompts[2]) and not torch.equal(prompts[0], prompts[1])


def test_sides_are_multiples_of_what_the_pipeline_takes(sana):
    sana.check_size(Size(32, 96))
    with pytest.raises(ConfigError, match="multiples of 32"):
        sana.check_size(Size(48, 32))
