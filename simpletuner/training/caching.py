"""The two phases before training: captions encoded and the text encoders gone, images encoded and the VAE gone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simpletuner.console import Console
from simpletuner.data.embeds import EmbedCache
from simpletuner.data.latents import LatentCache
from simpletuner.memory.precision import quantise
from simpletuner.memory.residency import release, vae_dtype, weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.options.memory import Memory
from simpletuner.types import Sample

LONGEST_SHOWN = 3
"""Captions over the token limit that are quoted."""


class Vae:
    """The VAE when it is needed: loaded at its first use, and again after a release. Safe to use from the loader's thread."""

    def __init__(self, family: ModelFamily, options: Memory, device: torch.device, memo_folder: Path) -> None:
        """
        Args:
            memo_folder: where digests of large weight files are remembered.
        """
        self._family, self._options, self._device, self._memo_folder = family, options, device, memo_folder
        self._vae: nn.Module | None = None
        self._lock = threading.RLock()

    def get(self) -> nn.Module:
        """The VAE on the accelerator."""
        with self._lock:
            if self._vae is None:
                vae: Any = self._family.load_vae(self._device, vae_dtype(self._options, self._device))
                if self._options.vae_enable_slicing:
                    vae.enable_slicing()
                if self._options.vae_enable_tiling:
                    vae.enable_tiling()
                self._vae = vae
            return self._vae

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode (B, 3, H, W) in [-1, 1] to raw `mean` and `std`, (B, C, h, w), on the CPU."""
        with self._lock:
            vae = self.get()
            moments = self._family.encode_pixels(vae, pixels.to(self._device))
            return {name: tensor.cpu() for name, tensor in moments.items()}

    def fingerprint(self) -> str:
        """What latents depend on besides the pixels, precision included."""
        return f"{self._family.vae_fingerprint(self._memo_folder)} {vae_dtype(self._options, self._device)}"

    def release(self) -> None:
        with self._lock:
            release(self._vae)
            self._vae = None


class TextEncoders:
    """The text encoders when they are needed: loaded at the first prompt, gone after `release`."""

    def __init__(self, family: ModelFamily, options: Memory, device: torch.device, memo_folder: Path) -> None:
        """
        Args:
            memo_folder: where digests of large weight files are remembered.
        """
        self._family, self._options, self._device, self._memo_folder = family, options, device, memo_folder
        self._encoders: Any = None

    def get(self) -> Any:
        if self._encoders is None:
            self._encoders = self._family.load_text_encoders(self._device, weight_dtype(self._options))
            for precision, module in zip(self._precisions(), self._family.text_modules(self._encoders)):
                quantise(module, precision)
        return self._encoders

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts to the family's tensors, (B, ...), on the CPU."""
        encoded = self._family.encode_text(self.get(), prompts)
        return {name: tensor.cpu() for name, tensor in encoded.items()}

    def fingerprint(self) -> str:
        """What embeddings depend on besides the prompt, precision included."""
        return f"{self._family.text_fingerprint(self._memo_folder)} {weight_dtype(self._options)} {' '.join(self._precisions())}"

    def release(self) -> None:
        release(self._encoders)
        self._encoders = None

    def _precisions(self) -> list[str]:
        options = self._options
        return [
            options.text_encoder_1_precision,
            options.text_encoder_2_precision,
            options.text_encoder_3_precision,
            options.text_encoder_4_precision,
        ]


def fill_text(cache: EmbedCache, encoders: TextEncoders, family: ModelFamily, prompts: Sequence[str], console: Console, accelerator: Accelerator) -> None:
    """Encode what is missing, each process its share, say which captions are too long, and let the encoders go."""
    missing = cache.missing(prompts)
    if missing:
        warn_of_long(missing, family.count_tokens(encoders.get(), missing), family.text_tokens, console)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with console.bar("text embeddings", len(mine), "captions") as bar:
            cache.fill(mine, bar)
        encoders.release()
    accelerator.wait_for_everyone()


def warn_of_long(prompts: Sequence[str], counts: Sequence[int], limit: int, console: Console) -> None:
    """Count and quote the captions of which the model will not see the end."""
    over = sorted(((count, prompt) for prompt, count in zip(prompts, counts) if count > limit), reverse=True)
    if not over:
        return
    shown = "; ".join(f"{count} tokens: {prompt[:60]}..." for count, prompt in over[:LONGEST_SHOWN])
    console.warn(f"{len(over)} captions are longer than the {limit} tokens that the model reads; the rest of each is not seen ({shown})")


def fill_latents(cache: LatentCache, vae: Vae, samples: Sequence[Sample], console: Console, accelerator: Accelerator) -> None:
    """Encode what is missing, each process its share, and let the VAE go."""
    missing = cache.missing(samples)
    if missing:
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with console.bar("latents", len(mine), "images") as bar:
            cache.fill(mine, bar)
        vae.release()
    accelerator.wait_for_everyone()


