"""Small pictures of latents, made while a sampler is at work: by a tiny autoencoder, or by a projection of a latent pixel to a colour.

Letters: B batch, C latent channels, H W pixels, h w latent pixels, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simpletuner.models.flow import unpack

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Decode = Callable[["Tensor"], "Tensor"]
"""Scaled latents (B, C, h, w) to colours in [-1, 1], (B, 3, H, W) or (B, 3, h, w)."""
SIDE, PATCH = 8, 4
"""Patches of one colour in a row and in a column, which a projection is fitted to, and the side of one in latent pixels."""


def unpacked(latents: Tensor, height: int, width: int) -> Tensor:
    """Latents as a pipeline holds them between its steps, as (B, C, h, w).

    Args:
        latents: these, or with an axis of frames, or packed into tokens (B, N, 4 C).
        height, width: h and w.
    """
    if latents.ndim == 3:
        return unpack(latents, height, width)
    return latents.squeeze(2) if latents.ndim == 5 else latents


def tiny_decoder(location: str, device: torch.device, dtype: torch.dtype) -> Decode:
    """A tiny autoencoder (https://github.com/madebyollin/taesd), from a folder or the hub.

    Raises:
        OSError, ValueError: there is none at that place.
    """
    from diffusers import AutoencoderTiny

    vae: Any = AutoencoderTiny.from_pretrained(location, torch_dtype=dtype).to(device).eval().requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        answer: Tensor = vae.decode(latents.to(device, dtype), return_dict=False)[0]
        return answer.float()

    return decode


def projection(encode: Decode, stride_px: int, device: torch.device) -> Decode:
    """The linear map from a latent pixel to a colour that fits best, by what an encoder makes of patches of one colour.

    Args:
        encode: pixels (B, 3, H, W) in [-1, 1] to scaled latents.
        stride_px: pixels to a latent pixel, along a side.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(SIDE**2, 3, generator=generator) * 2 - 1
    small = colours.t().reshape(1, 3, SIDE, SIDE).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)  # (1, 3, h, w)
    pixels = small.repeat_interleave(stride_px, 2).repeat_interleave(stride_px, 3).to(device)
    latents = encode(pixels).float()
    seen = latents[0].flatten(1).t()  # (h w, C)
    known = torch.cat([seen, torch.ones_like(seen[:, :1])], 1).double()
    matrix = torch.linalg.lstsq(known.cpu(), small[0].flatten(1).t().double()).solution.float().to(device)  # (C + 1, 3)

    def decode(latents: Tensor) -> Tensor:
        mixed = torch.einsum("bchw,cd->bdhw", latents.float().to(device), matrix[:-1])
        return mixed + matrix[-1].view(1, 3, 1, 1)

    return decode
