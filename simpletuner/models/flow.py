"""What families that learn by flow matching share: the distribution of times, and latents cut into tokens of 2 x 2.

Letters: B batch, C latent channels, h w latent pixels, N image tokens (h/2 x w/2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.times import FAST, Beta, Listed, LogitNormal, Times, Uniform

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.options.diffusion import Diffusion


def flow_matching(options: Diffusion, shift: float, guidance: float | None = None) -> FlowMatching:
    """Make the process that the options ask for.

    Args:
        shift: the family's own, where the options name none.
        guidance: that a distilled model is told at each step.
    """
    times: Times = LogitNormal(options.flow_sigmoid_scale)
    if options.flow_use_uniform_schedule:
        times = Uniform()
    elif options.flow_use_beta_schedule:
        times = Beta(options.flow_beta_schedule_alpha, options.flow_beta_schedule_beta)
    elif options.flux_fast_schedule:
        times = FAST
    elif options.flow_custom_timesteps:
        times = Listed(tuple(options.flow_custom_timesteps))
    wanted = shift if options.flow_schedule_shift is None else options.flow_schedule_shift
    is_listed = isinstance(times, Listed)
    if is_listed:  # these are meant as they stand
        wanted = 1.0
    most = None
    if guidance is not None and options.distilled_guidance_mode == "random-range":
        guidance, most = options.distilled_guidance_min, options.distilled_guidance_max
    return FlowMatching(times, None if options.flow_schedule_auto_shift and not is_listed else wanted, guidance, most)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to tokens of 2 x 2 latent pixels, (B, N, 4 C), row by row."""
    count, channels, height, width = latents.shape
    cells = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`: tokens (B, N, 4 C) to (B, C, h, w)."""
    count, _, channels = tokens.shape
    cells = tokens.view(count, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(count, channels // 4, height, width)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Where each token lies, (N, 3): zero, row, column; of a grid of `height` x `width` tokens."""
    import torch

    ids = torch.zeros(height, width, 3, device=like.device, dtype=like.dtype)
    ids[..., 1] += torch.arange(height, device=like.device, dtype=like.dtype)[:, None]
    ids[..., 2] += torch.arange(width, device=like.device, dtype=like.dtype)[None, :]
    return ids.reshape(height * width, 3)
