"""Facts of a model from files alone, against the model itself."""

from __future__ import annotations

import pytest
import torch

from simpletuner import plugins
from simpletuner.cli.choices import family_of
from simpletuner.data.doctor.findings import ModelFacts
from simpletuner.data.doctor.shapes import latent_bytes
from simpletuner.data.records import pack
from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.models.offline import shapes, text_bytes, token_counter
from simpletuner.options.models import Models
from simpletuner.types import Crop, Geometry, Sample, Size
from tests.builders.run import tiny_model
from tests.training.families import TINY
from tests.training.families import family as tiny_family

CPU = torch.device("cpu")
MOST_OVERHEAD_BYTES = 600
"""The head of an entry, and what it says of itself."""
CAPTIONS = ["", "a cat", "a much longer caption, with punctuation! And 海辺 in it", "x" * 900]


def family(**options):
    return AuraFlow(Models(model_family="auraflow", **options))


def test_tokens_are_counted_as_the_family_counts_them():
    local = family(pretrained_model_name_or_path=str(tiny_model()))
    encoders = local.load_text_encoders(torch.device("cpu"), torch.float32)

    count = token_counter(local)

    assert count is not None
    assert count(CAPTIONS) == local.count_tokens(encoders, CAPTIONS)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_expected_size_of_a_cache_is_what_it_stores(name):
    local = tiny_family(name)
    found = shapes(local)

    text = local.encode_text(local.load_text_encoders(CPU, torch.float32), ["a cat"])
    latents = local.encode_pixels(local.load_vae(CPU, torch.float32), torch.zeros(1, 3, 64, 96))

    assert found.assumed == ()
    assert {key: tuple(tensor.shape[1:]) for key, tensor in text.items()} == found.text
    sample = Sample("pictures", "a.png", "00", Geometry(Size(96, 64), Size(96, 64), Crop(0, 0, 96, 64)), ("a cat",))
    facts = ModelFacts(local.text_tokens, found.latents.channels, found.latents.stride_px, text_bytes(found.text, 4))
    assert 0 <= stored(text) - facts.text_bytes < MOST_OVERHEAD_BYTES
    assert 0 <= stored(latents) - latent_bytes([("00", sample)], facts) < MOST_OVERHEAD_BYTES


def stored(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of an entry of the cache that holds the first row of each."""
    return pack(b"0" * 16, {key: tensor[0] for key, tensor in tensors.items()}, {}).length


RELEASED = {
    "auraflow": (4, 8, {"prompt": (256, 2048), "mask": (256,)}),
    "chroma": (16, 8, {"prompt": (512, 4096), "mask": (512,)}),
    "flux": (16, 8, {"prompt": (512, 4096), "pooled": (768,)}),
    "flux2": (32, 8, {"prompt": (512, 3 * 4096)}),
    "lumina2": (16, 8, {"prompt": (256, 2304), "mask": (256,), "negative": (256, 2304), "negative_mask": (256,)}),
    "pixart": (4, 8, {"prompt": (300, 4096), "mask": (300,)}),
    "qwen_image": (16, 8, {"prompt": (512, 3584), "mask": (512,)}),
    "sana": (32, 32, {"prompt": (300, 2304), "mask": (300,), "negative": (300, 2304), "negative_mask": (300,)}),
    "sd1x": (4, 8, {"prompt": (77, 768)}),
    "sd2x": (4, 8, {"prompt": (77, 1024)}),
    "sd3": (16, 8, {"prompt": (77 + 256, 4096), "pooled": (768 + 1280,)}),
    "sdxl": (4, 8, {"prompt": (77, 768 + 1280), "pooled": (1280,)}),
    "z_image": (16, 8, {"prompt": (512, 2560), "mask": (512,)}),
}
"""Of each family's first flavour, from its published configurations: channels and stride of latents, and text."""


@pytest.mark.parametrize("name", plugins.names("simpletuner.models.families"))
def test_what_is_not_here_is_taken_to_be_as_released_and_said_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    released = family_of(name)(Models(model_family=name))

    found = shapes(released)

    assert token_counter(released) is None
    assert (found.latents.channels, found.latents.stride_px, found.text) == RELEASED[name]
    assert len(found.assumed) == 2


@pytest.mark.parametrize(("flavour", "width"), [("dev", 3 * 5120), ("klein-4b", 3 * 2560), ("klein-4b-distilled", 3 * 2560)])
def test_the_text_of_flux_2_is_as_wide_as_the_language_model_of_its_flavour(flavour, width):
    found = shapes(family_of("flux2")(Models(model_family="flux2", model_flavour=flavour)))

    assert found.text == {"prompt": (512, width)}


def test_the_language_model_may_be_one_part_of_two():
    wide = {"hidden_size": 64, "text_config": {"hidden_size": 3584}}

    assert family_of("qwen_image")(Models(model_family="qwen_image")).text_shapes([wide])["prompt"] == (512, 3584)


def test_a_single_file_on_the_hub_is_not_fetched_to_tell_its_shapes(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    single = family(pretrained_model_name_or_path="https://huggingface.co/maker/model/blob/main/aura.safetensors")

    assert token_counter(single) is None
    assert len(shapes(single).assumed) == 2
    assert single.notes() == [] and single.text_tokens > 0
    single.check_source()
