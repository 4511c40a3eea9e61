"""A tiny AuraFlow transformer, and adapters on it."""

from __future__ import annotations

import json

import pytest
import torch

from simpletuner.adapters.adapter import Adapter, Targets, kind_of
from simpletuner.options.adapters import Adapters
from simpletuner.plugins import load

TARGETS = Targets(
    class_aliases={"Attention": ("Attention",), "FeedForward": ("AuraFlowFeedForward",)},
    suffixes=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_qkv"),
)


@pytest.fixture
def make_denoiser():
    """A function that gives the same small AuraFlow transformer each time it is called."""
    from diffusers import AuraFlowTransformer2DModel

    def make(dtype=torch.float32):
        torch.manual_seed(7)
        model = AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=16,
        )
        for parameter in model.parameters():  # its own start is so small that no layer matters to the answer
            torch.nn.init.normal_(parameter, std=0.15)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.eval()

    return make


@pytest.fixture
def run():
    """A function that runs a denoiser on fixed inputs."""

    def call(denoiser):
        dtype = next(value.dtype for value in denoiser.parameters() if value.dtype != torch.float64)
        generator = torch.Generator().manual_seed(1)
        return denoiser(
            hidden_states=torch.randn(2, 4, 8, 8, generator=generator).to(dtype),
            encoder_hidden_states=torch.randn(2, 5, 24, generator=generator).to(dtype),
            timestep=torch.tensor([0.3, 0.8], dtype=dtype),
            return_dict=False,
        )[0]

    return call


@pytest.fixture
def make_adapter(tmp_path):
    """A function that builds an adapter of a kind; for LyCORIS from the content of its file."""

    def make(lycoris=None, **options) -> Adapter:
        if lycoris is not None:
            path = tmp_path / "lycoris_config.json"
            path.write_text(json.dumps(lycoris))
            options = {"lora_type": "lycoris", "lycoris_config": str(path), **options}
        section = Adapters(**options)
        return load("simpletuner.adapters.kinds", kind_of(section), Adapter)(section, TARGETS)

    return make


@pytest.fixture
def perturb():
    """A function that moves every parameter of an adapter away from its start, the same way each time."""

    def move(adapter, size=0.1):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)

    return move
