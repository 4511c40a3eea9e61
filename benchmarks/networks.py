"""The denoisers that are measured, at three sizes, with random weights that are drawn layer by layer where they will be.

Nothing of simpletuner is imported here: the loops that it is compared with must not pay for it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RELEASED = Path(__file__).parents[1] / "simpletuner" / "models" / "released.json"
NAMES = {"auraflow": "auraflow", "sdxl": "sdxl", "flux": "flux-dev"}
"""In that file."""
FOLDERS = {"auraflow": "transformer", "sdxl": "unet", "flux": "transformer"}
SMALLER: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "auraflow": {
        "medium": {
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 4,
            "attention_head_dim": 64,
            "num_attention_heads": 9,
            "joint_attention_dim": 256,
            "caption_projection_dim": 576,
            "pos_embed_max_size": 4096,
        },
        "tiny": {
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 256,
        },
    },
    "sdxl": {
        "medium": {
            "block_out_channels": [96, 192, 288],
            "attention_head_dim": [2, 3, 6],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 384,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 256,
        },
        "tiny": {
            "block_out_channels": [16, 32, 32],
            "attention_head_dim": [1, 2, 2],
            "transformer_layers_per_block": [1, 1, 2],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
    },
    "flux": {
        "medium": {
            "num_layers": 3,
            "num_single_layers": 6,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 128,
            "axes_dims_rope": [16, 24, 24],
        },
        "tiny": {
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
    },
}
CLASSES = {"auraflow": ("Attention", "AuraFlowFeedForward"), "sdxl": ("Attention", "FeedForward"), "flux": ("FluxAttention", "FeedForward")}
"""Whose linear layers a LoKr adapts: attention and feed-forward."""
SUFFIXES = {
    "auraflow": ("to_k", "to_q", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "sdxl": ("to_k", "to_q", "to_v", "to_out.0"),
    "flux": ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
}
"""Names of the layers that a LoRA adapts: attention."""


def config_of(model: str, size: str) -> tuple[str, dict[str, Any]]:
    """The class in diffusers and the configuration of a denoiser."""
    found = json.loads(RELEASED.read_text())["networks"][NAMES[model]]
    return found["class"].split(".")[-1], {**found["config"], **({} if size == "real" else SMALLER[model][size])}


def empty(model: str, size: str) -> Any:
    """A denoiser whose parameters are on the meta device; its buffers have their numbers."""
    import diffusers
    from accelerate import init_empty_weights

    kind, config = config_of(model, size)
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        return getattr(diffusers, kind).from_config(config).requires_grad_(False)


def draw(module: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give a module's own parameters random numbers, spread as those of a new layer: products keep the size of what goes in."""
    for name, parameter in module.named_parameters(recurse=False):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            values.normal_(0, math.sqrt(parameter.shape[0] / (3 * parameter.numel())), generator=generator)
        else:
            values.fill_(1.0 if name == "weight" else 0.0)
        module._parameters[name] = nn.Parameter(values, requires_grad=False)


def random_network(model: str, size: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A frozen denoiser on its device; no more of it than a layer is ever elsewhere."""
    network: nn.Module = empty(model, size)
    generator = torch.Generator(device).manual_seed(seed)
    for module in network.modules():
        draw(module, device, dtype, generator)
    return network.to(device).eval()


def twin(network: nn.Module) -> nn.Module:
    """The same modules once more, around the same weights: adapters on one are not on the other, and no weight is there twice."""
    shared = [*network.parameters(), *network.buffers()]
    made: nn.Module = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    return made


def write_model(folder: Path, model: str, size: str) -> Path:
    """Write a model of which everything is there but the denoiser's weights, with text encoders and a VAE that are small whatever its size."""
    import diffusers

    from tests.builders.auraflow import build_tokenizer
    from tests.builders.stable_diffusion import build_clip_tokenizer

    kind, config = config_of(model, size)
    parts: dict[str, Any] = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": _vae(16 if model == "flux" else 4)}
    if model == "auraflow":
        tokenizer = build_tokenizer()
        sizes = (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
        parts |= {"tokenizer": tokenizer, "text_encoder": _umt5(sizes, config["joint_attention_dim"])}
        pipeline = "AuraFlowPipeline"
    elif model == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        first = config["cross_attention_dim"] * 3 // 8
        tokenizers = {name: build_clip_tokenizer(folder / "words") for name in ("tokenizer", "tokenizer_2")}
        encoders = {"text_encoder": _clip(first), "text_encoder_2": _clip(config["cross_attention_dim"] - first, pooled)}
        schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1}
        parts |= {**tokenizers, **encoders, "scheduler": diffusers.EulerDiscreteScheduler(**schedule)}
        pipeline = "StableDiffusionXLPipeline"
    else:
        tokenizer = build_tokenizer()
        t5 = {"tokenizer_2": tokenizer, "text_encoder_2": _t5(len(tokenizer), config["joint_attention_dim"])}
        parts |= {**t5, "tokenizer": build_clip_tokenizer(folder / "words"), "text_encoder": _clip(config["pooled_projection_dim"])}
        pipeline = "FluxPipeline"
    index: dict[str, Any] = {"_class_name": pipeline, FOLDERS[model]: ["diffusers", kind]}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (folder / FOLDERS[model]).mkdir()
    (folder / FOLDERS[model] / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _vae(channels: int) -> Any:
    """Of stride 8."""
    from diffusers import AutoencoderKL

    sides = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    shift = {"shift_factor": 0.1} if channels == 16 else {}
    return AutoencoderKL(
        **sides, block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=channels, norm_num_groups=4, mid_block_add_attention=False, **shift
    )


def _umt5(sizes: tuple[int, int, int], width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    vocabulary, pad, eos = sizes
    return UMT5EncoderModel(
        UMT5Config(vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2, pad_token_id=pad, eos_token_id=eos)
    )


def _t5(vocabulary: int, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2))


def _clip(width: int, projection: int | None = None) -> Any:
    """With a projection of what it answers, if that has a width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        **ends,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def layers_of(network: nn.Module, classes: tuple[str, ...] = (), suffixes: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Linear layers by their names: those inside of modules of some classes, or those of some names."""
    inside = tuple(f"{name}." for name, module in network.named_modules() if type(module).__name__ in classes)
    endings = tuple(f".{suffix}" for suffix in suffixes)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linear.items() if (inside and name.startswith(inside)) or (endings and name.endswith(endings))}


def latents_of(model: str, width: int, height: int, count: int, device: torch.device) -> Tensor:
    """Random latents (B, C, h, w) of pictures."""
    return torch.randn(count, 16 if model == "flux" else 4, height // 8, width // 8, device=device)
