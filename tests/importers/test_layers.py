"""The names of layers that importers write must be those that the models have."""

from __future__ import annotations

import re

import pytest
import torch

from simpletuner.adapters.targets import adaptable, match_suffix
from simpletuner.importers.importer import Imported
from simpletuner.importers.layers import CLASSES, IN_TRANSFORMERS, IN_UNETS, adapt, adapt_by_lycoris
from tests.training.families import family


@pytest.mark.parametrize("name", ["sd1x", "sdxl"])
def test_each_end_of_a_name_finds_layers_in_a_unet_and_everything_is_all_of_them(name):
    layers = adaptable(family(name).load_denoiser(torch.float32, 0))

    assert [end for end in IN_UNETS["everything"] if not match_suffix(end, layers)] == []
    found = {layer for end in IN_UNETS["everything"] for layer in match_suffix(end, layers)}
    assert found == set(layers)


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image", "lumina2", "auraflow"])
def test_the_pattern_for_blocks_finds_the_blocks_of_a_transformer_and_nothing_around_them(name):
    layers = adaptable(family(name).load_denoiser(torch.float32, 0))

    inside = {layer for layer in layers if re.match(IN_TRANSFORMERS["blocks"], layer)}
    attention = {layer for layer in layers if re.match(IN_TRANSFORMERS["attention"], layer)}

    assert inside and attention < inside
    assert inside == {layer for layer in layers if re.search(r"\.\d+\.", layer) and "embed" not in layer.split(".")[0]}


@pytest.mark.parametrize(
    ("name", "reach", "trains_text", "expected"),
    [
        (
            "sd1x",
            "transformers",
            True,
            {"lora_type": "standard", "train_text_encoder": True, "peft_lora_target_modules": list(IN_UNETS["transformers"])},
        ),
        ("flux", "blocks", False, {"lora_type": "standard", "flux_lora_target": "ai-toolkit"}),
        ("qwen_image", "blocks", True, {"lora_type": "lycoris"}),
    ],
)
def test_a_lora_is_a_plain_one_where_its_layers_have_names(name, reach, trains_text, expected):
    found = Imported({"model_family": name})

    adapt(found, reach, 8, 4, trains_text=trains_text)

    assert {key: found.config.get(key) for key in expected} == expected
    assert bool(found.lycoris) == (expected["lora_type"] == "lycoris")


def test_lycoris_takes_classes_in_a_unet_and_patterns_in_a_transformer():
    unet, transformer = Imported({"model_family": "sdxl"}), Imported({"model_family": "sd3"})

    adapt_by_lycoris(unet, "convolutions", {"algo": "lokr"})
    adapt_by_lycoris(transformer, ".*attn", {"algo": "loha"})

    assert unet.lycoris["apply_preset"] == {"target_module": list(CLASSES["convolutions"])}
    assert transformer.lycoris["apply_preset"] == {"target_name": [".*attn"]}
