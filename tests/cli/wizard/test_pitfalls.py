"""Pitfalls are named where they are, and nowhere else."""

from __future__ import annotations

import dataclasses

import pytest

from simpletuner.cli.wizard.machine import Card, Machine
from simpletuner.cli.wizard.pitfalls import pitfalls


def test_what_is_proposed_for_good_pictures_has_no_pitfall(propose_for):
    for gigabytes in (6, 8, 12, 24, 80):
        assert pitfalls(propose_for(gigabytes)) == []


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"train_batch_size": 32}, "more than your 20 pictures"),
        ({"learning_rate": 1e-2}, "far from 0.0001"),
        ({"optimizer": "optimi-lion", "learning_rate": 1e-4}, "wants a tenth of it"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "finds its own, from 1"),
        ({"model_family": "sdxl", "lora_type": "lycoris", "lokr_layers": "attention+feedforward"}, "NaN"),
        ({"attention_mechanism": "sageattention", "sageattention_usage": "training"}, "SageAttention in training"),
        ({"model_type": "full", "model_family": "auraflow"}, "the card has 24 GB"),
        ({"model_type": "full", "model_family": "sd1x"}, "few for all weights"),
        ({"model_family": "sd1x", "resolution": 1024}, "made for 512 px"),
        ({"resolution": 256}, "at 256 it knows little"),
        ({"caption_strategy": "filename"}, "file names say nothing"),
    ],
)
def test_a_pitfall_is_named(propose_for, chosen, said):
    found = pitfalls(propose_for(**chosen))

    assert any(said in text for text in found), found


def test_pictures_that_are_too_small_are_counted_without_those_left_out(propose_for):
    s = propose_for(size=(600, 600), resolution=1024)
    mixed = dataclasses.replace(s, pictures=dataclasses.replace(s.pictures, sizes=((600, 600), (300, 300), (2000, 2000)), has_text=(True,) * 3))
    without = dataclasses.replace(mixed, chosen={**s.chosen, "minimum_image_size": 512})

    assert any(text.startswith("2 of 3 pictures are clearly smaller") for text in pitfalls(mixed))
    assert any(text.startswith("1 of 2 pictures are clearly smaller") for text in pitfalls(without))


def test_bf16_on_a_card_that_lacks_it_and_a_full_disk_are_named(propose_for):
    old = Machine((Card("Tesla T4", 16 * 10**9, 16 * 10**9, has_bf16=False),), disk_bytes=10**9)
    s = propose_for(machine=old, mixed_precision="bf16")
    hub = dataclasses.replace(s, model_of=lambda *names: dataclasses.replace(s.model, is_here=False))

    found = " ".join(pitfalls(hub))

    assert "set mixed_precision to fp16" in found and "1 GB of disk are free" in found and "HF_TOKEN" in found
