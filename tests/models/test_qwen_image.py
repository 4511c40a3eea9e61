from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.models.families.qwen_image import QwenImage
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised
from tests.builders.qwen_image import build_tiny_qwen_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> QwenImage:
    folder: Path = build_tiny_qwen_image(tmp_path_factory.mktemp("models") / "qwen_image")
    return QwenImage(Models(model_family="qwen_image", pretrained_model_name_or_path=str(folder), tokenizer_max_length=24))


def test_pictures_are_films_of_one_picture_to_the_vae(qwen_image):
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = qwen_image.load_vae(CPU, torch.float32)

    moments = qwen_image.encode_pixels(vae, pixels)

    expected = vae.encode(pixels[:, :, None]).latent_dist
    assert moments["mean"].shape == moments["std"].shape == (2, 4, 8, 12) and qwen_image.vae_stride == 4
    assert torch.equal(moments["mean"], expected.mean[:, :, 0]) and torch.allclose(moments["std"], expected.std[:, :, 0])


def test_every_channel_has_a_mean_and_a_deviation_of_its_own(qwen_image):
    mean, std = torch.tensor([-0.5, 0.1, 0.3, 0.9]), torch.tensor([0.5, 1.0, 1.5, 2.0])
    raw = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    scaled = qwen_image.scale_latents(raw * std[:, None, None] + mean[:, None, None])

    assert torch.allclose(scaled, raw, atol=1e-6)


def test_the_template_does_not_count_but_what_ends_it_does(qwen_image):
    encoders = qwen_image.load_text_encoders(CPU, torch.float32)

    empty, short, long = qwen_image.count_tokens(encoders, ["", "a cat", "a cat" * 20])
    masks = qwen_image.encode_text(encoders, ["", "a cat", "a cat" * 20])["mask"].sum(dim=1).tolist()

    assert (short, long) == (empty + 5, empty + 100) and masks == [empty, short, 24]


def test_prompts_of_other_lengths_in_a_batch_make_no_difference(qwen_image):
    denoiser, encoders = qwen_image.load_denoiser(torch.float32, 0), qwen_image.load_text_encoders(CPU, torch.float32)
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))

    def answer(*captions: str) -> torch.Tensor:
        batch = Batch((), captions, {}, qwen_image.encode_text(encoders, captions))
        many = latents.expand(len(captions), -1, -1, -1)
        return qwen_image.predict(denoiser, Noised(many, many, torch.full((len(captions),), 0.3)), batch)[0]

    with torch.no_grad():
        assert torch.allclose(answer("a cat"), answer("a cat", "", "a longer caption"), atol=1e-5)
        assert not torch.allclose(answer("a cat"), answer("a dog"), atol=1e-5)


def test_guidance_goes_by_the_name_that_has_an_effect_in_this_pipeline(qwen_image):
    assert qwen_image.pipeline_call_arguments(4.0) == {"true_cfg_scale": 4.0}
