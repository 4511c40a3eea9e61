from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.models.families.z_image import ZImage
from simpletuner.models.text import fill_up, unpadded
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised
from tests.builders.z_image import build_tiny_z_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> ZImage:
    folder: Path = build_tiny_z_image(tmp_path_factory.mktemp("models") / "z_image")
    return ZImage(Models(model_family="z_image", pretrained_model_name_or_path=str(folder), tokenizer_max_length=24))


def test_a_flavour_says_which_model():
    assert ZImage(Models(model_family="z_image")).source_name() == "Tongyi-MAI/Z-Image"
    assert ZImage(Models(model_family="z_image", model_flavour="turbo")).source_name() == "Tongyi-MAI/Z-Image-Turbo"


def test_what_was_filled_up_comes_back():
    states = [torch.ones(2, 3), torch.full((4, 3), 2.0), torch.zeros(0, 3)]

    text = fill_up(states, 5)

    assert text["prompt"].shape == (3, 5, 3) and text["mask"].sum(dim=1).tolist() == [2, 4, 0]
    assert all(torch.equal(mine, own) for mine, own in zip(unpadded(text), states, strict=True))
    assert float(text["prompt"].sum()) == 2 * 3 + 4 * 3 * 2


def test_the_words_around_a_prompt_count_as_tokens(z_image):
    encoders = z_image.load_text_encoders(CPU, torch.float32)

    empty, short, long = z_image.count_tokens(encoders, ["", "a cat", "a cat" * 20])
    masks = z_image.encode_text(encoders, ["", "a cat", "a cat" * 20])["mask"].sum(dim=1).tolist()

    assert (short, long) == (empty + 5, empty + 100) and masks == [empty, short, 24]


def test_prompts_of_other_lengths_in_a_batch_make_no_difference(z_image):
    denoiser, encoders = z_image.load_denoiser(torch.float32, 0), z_image.load_text_encoders(CPU, torch.float32)
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))

    def answer(*captions: str) -> torch.Tensor:
        batch = Batch((), captions, {}, z_image.encode_text(encoders, captions))
        many = latents.expand(len(captions), -1, -1, -1)
        return z_image.predict(denoiser, Noised(many, many, torch.full((len(captions),), 0.3)), batch)[0]

    with torch.no_grad():
        assert torch.allclose(answer("a cat"), answer("a cat", "", "a longer caption"), atol=1e-5)
        assert not torch.allclose(answer("a cat"), answer("a dog"), atol=1e-5)
