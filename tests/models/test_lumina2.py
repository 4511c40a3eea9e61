from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.errors import ConfigError
from simpletuner.models.families.lumina2 import Lumina2
from simpletuner.options.models import Models
from simpletuner.types import Batch, Noised, Size
from tests.builders.lumina2 import build_tiny_lumina2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_lumina2(tmp_path_factory.mktemp("models") / "lumina2")


def lumina2(folder: Path, **options: Any) -> Lumina2:
    return Lumina2(Models(model_family="lumina2", pretrained_model_name_or_path=str(folder), **{"tokenizer_max_length": 24, **options}))


def test_more_text_than_the_model_has_positions_for_is_refused(folder):
    lumina2(folder, tokenizer_max_length=47).load_text_encoders(CPU, torch.float32)

    with pytest.raises(ConfigError, match="tokenizer_max_length 48 is too long") as caught:
        lumina2(folder, tokenizer_max_length=48).load_text_encoders(CPU, torch.float32)

    assert "47" in caught.value.hint


def test_sizes_beyond_the_positions_are_refused(folder):
    family = lumina2(folder)

    family.check_size(Size(256, 16))
    with pytest.raises(ConfigError, match="too large"):
        family.check_size(Size(272, 16))


def test_the_words_before_a_prompt_count_as_tokens(folder):
    family = lumina2(folder)

    empty, short = family.count_tokens(family.load_text_encoders(CPU, torch.float32), ["", "a cat"])

    assert (empty, short) == (3, 8)  # start, the instruction and the mark after it, letters


def test_prompts_of_other_lengths_in_a_batch_make_no_difference(folder):
    family = lumina2(folder)
    denoiser, encoders = family.load_denoiser(torch.float32, 0), family.load_text_encoders(CPU, torch.float32)
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))

    def answer(*captions: str) -> torch.Tensor:
        batch = Batch((), captions, {}, family.encode_text(encoders, captions))
        many = latents.expand(len(captions), -1, -1, -1)
        return family.predict(denoiser, Noised(many, many, torch.full((len(captions),), 0.3)), batch)[0]

    with torch.no_grad():
        assert torch.allclose(answer("a cat"), answer("a cat", "", "a longer caption"), atol=1e-5)
        assert not torch.allclose(answer("a cat"), answer("a dog"), atol=1e-5)
