"""Facts of a model from files alone, against the model itself."""

from __future__ import annotations

import torch

from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.models.offline import shapes, text_bytes, token_counter
from simpletuner.options.models import Models
from tests.builders.run import tiny_model

CAPTIONS = ["", "a cat", "a much longer caption, with punctuation! And 海辺 in it", "x" * 900]


def family(**options):
    return AuraFlow(Models(model_family="auraflow", **options))


def test_tokens_are_counted_as_the_family_counts_them():
    local = family(pretrained_model_name_or_path=str(tiny_model()))
    encoders = local.load_text_encoders(torch.device("cpu"), torch.float32)

    count = token_counter(local)

    assert count is not None
    assert count(CAPTIONS) == local.count_tokens(encoders, CAPTIONS)


def test_shapes_are_those_of_what_is_cached():
    local = family(pretrained_model_name_or_path=str(tiny_model()), tokenizer_max_length=24)
    encoders = local.load_text_encoders(torch.device("cpu"), torch.float32)
    vae = local.load_vae(torch.device("cpu"), torch.float32)

    found = shapes(local)

    text = local.encode_text(encoders, ["a cat"])
    latents = local.encode_pixels(vae, torch.zeros(1, 3, 32, 64))["mean"]
    assert found.assumed == ()
    assert text_bytes(local, found.text_width, 4) == sum(tensor.numel() * tensor.element_size() for tensor in text.values())
    assert latents.shape == (1, found.latent_channels, 32 // found.stride_px, 64 // found.stride_px)


def test_what_is_not_here_is_assumed_and_said_without_asking_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    released = family(model_flavour="v0.3")

    found = shapes(released)

    assert token_counter(released) is None
    assert (found.latent_channels, found.stride_px) == (4, 8)
    assert len(found.assumed) == 2


def test_a_single_file_on_the_hub_is_not_fetched_to_tell_its_shapes(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    single = family(pretrained_model_name_or_path="https://huggingface.co/maker/model/blob/main/aura.safetensors")

    assert token_counter(single) is None
    assert len(shapes(single).assumed) == 2
    assert single.notes() == [] and single.text_tokens > 0
    single.check_source()
