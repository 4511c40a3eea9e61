"""What we are compared with, each as a loop that takes one step at a call; nothing of simpletuner is in them.

floor: the shortest loop body of plain PyTorch with the same form of adapter, written here. Its batches lie on the device.
library: the same loop with LyCORIS as it comes, which builds each adapted weight anew at every step, in bf16.
peer: what the training scripts of diffusers do (examples/text_to_image/train_text_to_image_lora_sdxl.py and
examples/dreambooth/train_dreambooth_lora_flux.py of diffusers 0.36, Apache-2.0): their formulas, PEFT's LoRA, accelerate around the network, and a
loss that is read at every step. There is none for AuraFlow, which gets Flux's.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width, N tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import device_named, host_peak_bytes
from benchmarks.networks import CLASSES, SUFFIXES, config_of, layers_of, random_network

TRAIN_STEPS = 1000
"""Of the schedule that SDXL learns by."""
WHOLE = 10_000
"""A dimension so large that LyCORIS keeps both factors of a LoKr whole."""


@dataclass(frozen=True)
class Feed:
    """A batch on its device."""

    latents: Tensor
    """(B, C, h, w), float32, scaled."""
    text: Mapping[str, Tensor]
    """`prompt` (B, T, D), and `pooled` where the model wants it; in the dtype of the denoiser."""
    sizes: Tensor
    """(B, 6), what SDXL is told of each picture."""


def feed_of(latents: Tensor, text: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Feed:
    """Move a batch to where it is trained on."""
    height, width = 8 * latents.shape[-2], 8 * latents.shape[-1]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=device).expand(len(latents), -1)
    return Feed(latents.float().to(device), {name: text[name].to(device, dtype) for name in ("prompt", "pooled") if name in text}, sizes)


def factors(dimension: int, factor: int) -> tuple[int, int]:
    """A dimension as the product of two, as LyCORIS divides it where `factor` does so without a rest."""
    assert dimension % factor == 0, (dimension, factor)
    return min(factor, dimension // factor), max(factor, dimension // factor)


class LoKr(nn.Module):
    """The product with kron(w1, w2) beside a layer, by its factors: the large one first, as it makes the answer smaller."""

    def __init__(self, layer: nn.Linear, factor: int, device: torch.device) -> None:
        super().__init__()
        (out_large, out_small), (in_large, in_small) = factors(layer.out_features, factor), factors(layer.in_features, factor)
        self.w1 = nn.Parameter(torch.randn(out_large, in_large, device=device) / math.sqrt(in_large))
        self.w2 = nn.Parameter(torch.randn(out_small, in_small, device=device) * 1e-3)
        self.base = [layer.forward]  # in a list: no module of this one
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        halfway = nn.functional.linear(blocks, self.w2.to(x.dtype)).transpose(-1, -2)
        answer: Tensor = self.base[0](x)
        return answer + nn.functional.linear(halfway, self.w1.to(x.dtype)).transpose(-1, -2).flatten(-2)


class LoRA(nn.Module):
    """B A beside a layer."""

    def __init__(self, layer: nn.Linear, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, device=device) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank, device=device) * 1e-3)
        self.base = [layer.forward]
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.base[0](x)
        return answer + nn.functional.linear(nn.functional.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def adapt(model: str, network: nn.Module, adapter: str, number: int, device: torch.device) -> nn.ModuleList:
    """Put an adapter of ours on a frozen network.

    Args:
        number: the factor of a lokr, the rank of a lora.
    """
    if adapter == "lokr":
        return nn.ModuleList(LoKr(layer, number, device) for layer in layers_of(network, classes=CLASSES[model]).values())
    return nn.ModuleList(LoRA(layer, number, device) for layer in layers_of(network, suffixes=SUFFIXES[model]).values())


def denoise(model: str, network: Any, noisy: Tensor, time: Tensor, feed: Feed) -> Tensor:
    """What the network says of noised latents (B, C, h, w), at a time in [0, 1], or for SDXL at a timestep."""
    if model == "auraflow":
        found: Tensor = network(hidden_states=noisy, encoder_hidden_states=feed.text["prompt"], timestep=time.to(noisy.dtype), return_dict=False)[0]
    elif model == "sdxl":
        told = {"text_embeds": feed.text["pooled"], "time_ids": feed.sizes}
        found = network(noisy, time, encoder_hidden_states=feed.text["prompt"], added_cond_kwargs=told, return_dict=False)[0]
    else:
        found = _flux(network, noisy, time, feed)
    return found


def _flux(network: Any, noisy: Tensor, time: Tensor, feed: Feed) -> Tensor:
    count, channels, height, width = noisy.shape
    cells = noisy.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    grid = torch.zeros(height // 2, width // 2, 3, device=noisy.device, dtype=noisy.dtype)
    grid[..., 1] += torch.arange(height // 2, device=noisy.device)[:, None]
    grid[..., 2] += torch.arange(width // 2, device=noisy.device)[None, :]
    answer = network(
        hidden_states=cells.reshape(count, height * width // 4, 4 * channels),  # (B, N, 4 C)
        encoder_hidden_states=feed.text["prompt"],
        pooled_projections=feed.text["pooled"],
        timestep=time.to(noisy.dtype),
        guidance=torch.ones(count, device=noisy.device),
        img_ids=grid.reshape(-1, 3),
        txt_ids=grid.new_zeros(feed.text["prompt"].shape[1], 3),
        return_dict=False,
    )[0]
    cells = answer.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(count, channels, height, width)


def noised(model: str, latents: Tensor, alpha_bars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise mixed into latents, the time that belongs to it, and what the network should say."""
    noise, count = torch.randn_like(latents), len(latents)
    if model == "sdxl":
        time = torch.randint(0, TRAIN_STEPS, (count,), device=latents.device)
        alpha_bar = alpha_bars[time].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise, time, noise
    time = torch.sigmoid(torch.randn(count, device=latents.device))
    t = time.view(-1, 1, 1, 1)
    return (1 - t) * latents + t * noise, time, noise - latents


def alpha_bars_on(device: torch.device) -> Tensor:
    """Of the schedule "scaled linear"."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float().to(device)


def passes(model: str, network: nn.Module, feed: Feed, alpha_bars: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss of a batch, with its graph."""
    noisy, time, target = noised(model, feed.latents, alpha_bars)
    return nn.functional.mse_loss(denoise(model, network, noisy.to(dtype), time, feed).float(), target)


def loop(model: str, network: nn.Module, parameters: Sequence[nn.Parameter], feeds: Sequence[Feed], dtype: torch.dtype) -> Callable[[], None]:
    """The shortest body of a loop that trains parameters; each call is a step."""
    device = feeds[0].latents.device
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    coming, alpha_bars = itertools.cycle(feeds), alpha_bars_on(device)

    def step() -> None:
        passes(model, network, next(coming), alpha_bars, dtype).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def checkpoint(network: Any, is_on: bool) -> Any:
    """Have a network compute its blocks again on the way back, as diffusers does it."""
    network.train()
    if is_on:
        network.enable_gradient_checkpointing()
    return network


def floor(model: str, network: nn.Module, adapter: str, number: int, feeds: Sequence[Feed], is_checkpointed: bool) -> tuple[Callable[[], None], int]:
    """The floor, and how many numbers it trains."""
    device, dtype = feeds[0].latents.device, feeds[0].text["prompt"].dtype
    parameters = list(adapt(model, checkpoint(network, is_checkpointed), adapter, number, device).parameters())
    return loop(model, network, parameters, feeds, dtype), sum(parameter.numel() for parameter in parameters)


def library(model: str, network: nn.Module, number: int, feeds: Sequence[Feed], is_checkpointed: bool) -> tuple[Callable[[], None], int]:
    """LyCORIS with its own defaults, as other trainers run it: all of it in the dtype of the base.

    Raises:
        ImportError: it is not here.
    """
    from lycoris import LycorisNetwork
    from lycoris.logging import logger

    logger.setLevel("ERROR")
    device, dtype = feeds[0].latents.device, feeds[0].text["prompt"].dtype
    LycorisNetwork.apply_preset({"target_module": list(CLASSES[model])})
    adapters = LycorisNetwork(checkpoint(network, is_checkpointed), lora_dim=WHOLE, alpha=1, network_module="lokr", factor=number)
    adapters.apply_to()
    adapters.to(device, dtype).train()
    parameters = [parameter for parameter in adapters.parameters() if parameter.requires_grad]
    step = loop(model, network, parameters, feeds, dtype)
    step.adapters = adapters  # type: ignore[attr-defined]  # its hooks refer to it weakly
    return step, sum(parameter.numel() for parameter in parameters)


def peer(model: str, network: nn.Module, rank: int, feeds: Sequence[Feed], is_checkpointed: bool) -> tuple[Callable[[], None], int]:
    """What the scripts of diffusers do in a step."""
    from accelerate import Accelerator
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    given: Any = checkpoint(network, is_checkpointed)
    given.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(SUFFIXES[model])))
    cast_training_params(given, dtype=torch.float32)
    parameters = [parameter for parameter in given.parameters() if parameter.requires_grad]
    device, dtype = feeds[0].latents.device, feeds[0].text["prompt"].dtype
    accelerator = Accelerator(mixed_precision="no")
    # Its own switch for bf16 is process-wide, and ours is off; the scripts have it wrap the network's forward pass in this.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    body = _denoising_loss if model == "sdxl" else _flow_loss
    losses, coming = body(model, given, device, dtype), itertools.cycle(feeds)

    def step() -> None:
        loss = losses(next(coming))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()  # for the progress bar

    return step, sum(parameter.numel() for parameter in parameters)


def _denoising_loss(model: str, network: Any, device: torch.device, dtype: torch.dtype) -> Callable[[Feed], Tensor]:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=TRAIN_STEPS)

    def losses(feed: Feed) -> Tensor:
        latents = feed.latents.to(dtype)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, TRAIN_STEPS, (len(latents),), device=device).long()
        with torch.autocast(device.type, dtype):
            prediction = denoise(model, network, scheduler.add_noise(latents, noise, timesteps), timesteps, feed)
        return nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")

    return losses


def _flow_loss(model: str, network: Any, device: torch.device, dtype: torch.dtype) -> Callable[[Feed], Tensor]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def sigmas_of(timesteps: Tensor, dimensions: int) -> Tensor:
        sigmas, known = scheduler.sigmas.to(device=device, dtype=dtype), scheduler.timesteps.to(device)
        places = [(known == time).nonzero().item() for time in timesteps.to(device)]
        return sigmas[places].flatten().view(-1, *[1] * (dimensions - 1))

    def losses(feed: Feed) -> Tensor:
        latents = feed.latents.to(dtype)
        noise = torch.randn_like(latents)
        density = compute_density_for_timestep_sampling("none", len(latents), 0.0, 1.0, 1.29)
        timesteps = scheduler.timesteps[(density * scheduler.config.num_train_timesteps).long()].to(device)
        sigmas = sigmas_of(timesteps, latents.ndim)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        with torch.autocast(device.type, dtype):
            prediction = denoise(model, network, noisy, timesteps / 1000, feed)
        weighting = compute_loss_weighting_for_sd3("none", sigmas)
        losses = (weighting.float() * (prediction.float() - (noise - latents).float()) ** 2).reshape(len(latents), -1)
        return losses.mean(1).mean()

    return losses


def alone(model: str, size: str, adapter: str, number: int, shape: Sequence[int], tokens: int, device: torch.device) -> Iterator[None]:
    """The floor in a process without anything of ours: each item is a step.

    Args:
        shape: of the latents, (B, C, h, w).
    """
    _, config = config_of(model, size)
    width = config["cross_attention_dim" if model == "sdxl" else "joint_attention_dim"]
    pooled = config.get("pooled_projection_dim", 0)
    if model == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    text = {"prompt": torch.randn(shape[0], tokens, width), **({"pooled": torch.randn(shape[0], pooled)} if pooled else {})}
    feed = feed_of(torch.randn(*shape), text, device, torch.bfloat16)
    step, _ = floor(model, random_network(model, size, device, torch.bfloat16), adapter, number, [feed], is_checkpointed=False)
    while True:
        step()
        yield


def main() -> None:
    """Train the floor in this process, and tell when its first step was done and how much main memory it took."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("words", nargs=4, metavar="WORD", help="model, size, adapter, device")
    parser.add_argument("numbers", nargs=7, type=int, metavar="NUMBER", help="factor or rank, B, C, h, w, tokens of a prompt, steps")
    given = parser.parse_args()
    (model, size, adapter, device), (number, *shape, tokens, steps) = given.words, given.numbers
    coming = alone(model, size, adapter, number, shape, tokens, device_named(device))
    next(coming)
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.time()
    for _ in range(steps):
        next(coming)
    print(json.dumps({"peak_bytes": host_peak_bytes(), "first_step_at": first}))


if __name__ == "__main__":
    main()
