from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.models.families.chroma import Chroma
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised
from tests.builders.chroma import build_tiny_chroma

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Chroma:
    folder: Path = build_tiny_chroma(tmp_path_factory.mktemp("models") / "chroma")
    return Chroma(Models(model_family="chroma", pretrained_model_name_or_path=str(folder), tokenizer_max_length=24))


def test_a_flavour_says_which_model():
    assert Chroma(Models(model_family="chroma")).source_name() == "lodestones/Chroma1-Base"
    assert Chroma(Models(model_family="chroma", model_flavour="hd")).source_name() == "lodestones/Chroma1-HD"


def test_one_token_of_padding_is_seen_besides_the_prompt(chroma):
    prompts = ["", "a cat", "a prompt that is longer than that"]

    mask = chroma.encode_text(chroma.load_text_encoders(CPU, torch.float32), prompts)["mask"]

    assert mask.sum(dim=1).tolist() == [1 + 1, 6 + 1, 24]  # with the end token
    assert mask[1].tolist() == [1] * 7 + [0] * 17


def test_padding_beyond_that_makes_no_difference_and_what_is_seen_does(chroma):
    denoiser = chroma.load_denoiser(torch.float32, 0)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = chroma.encode_text(chroma.load_text_encoders(CPU, torch.float32), ["a cat"])

    def answer(changed: slice) -> torch.Tensor:
        prompt = text["prompt"].clone()
        prompt[:, changed] += 1.0
        return chroma.predict(denoiser, Noised(latents, latents, torch.tensor([0.5])), Batch((), ("a cat",), {}, {**text, "prompt": prompt}))

    with torch.no_grad():
        plain, beyond, first = answer(slice(0, 0)), answer(slice(7, 24)), answer(slice(6, 7))

    assert torch.equal(plain, beyond) and torch.isfinite(plain).all()
    assert not torch.allclose(plain, first, atol=1e-5)
