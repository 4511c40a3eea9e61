"""Pictures that are still being made, shown small every few sampling steps. A preview that fails costs no picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.console import Console
from simpletuner.errors import SimpleTunerError
from simpletuner.models.family import ModelFamily
from simpletuner.models.preview import Decode, projection, tiny_decoder, unpacked
from simpletuner.options.validation import Validation
from simpletuner.training.prompts import Picture
from simpletuner.training.validation import write_picture

FOLDER = "previews"
LINEAR = "linear"
"""The value of `validation_preview_model` that asks for no tiny autoencoder."""
LONGEST_PX = 384
Show = Callable[[int, str, str, int, Image.Image], None]
"""Is given the optimizer step, the picture's name and prompt, the sampling steps that are done, and what it looks like."""


class Previews:
    """Turns latents into small pictures, and hands them on: into a file for each prompt, which is replaced, and to `show`."""

    def __init__(self, family: ModelFamily, options: Validation, folder: Path, device: torch.device, console: Console, show: Show) -> None:
        self._family, self._options, self._device, self._console, self._show = family, options, device, console, show
        self._folder = folder / FOLDER
        self._decode: Decode | None = None
        self._is_off = False
        self._step = 0

    def begin(self, vae: nn.Module) -> None:
        """Find out how latents are decoded, with the VAE that validation has loaded."""
        if self._decode is None and not self._is_off:
            try:
                self._decode = self._tiny() or self._projection(vae)
            except (RuntimeError, SimpleTunerError) as error:  # no room on the card, a VAE that encodes nothing
                self._give_up(error)

    def at_step(self, step: int) -> None:
        """Learn how many optimizer steps the pictures that follow have behind them."""
        self._step = step

    def take(self, picture: Picture, done: int, latents: Tensor) -> None:
        """Show what a picture has come to, if that is due.

        Args:
            done: sampling steps done.
            latents: as the pipeline holds them.
        """
        if self._decode is None or done % self._options.validation_preview_steps:
            return
        try:
            stride = self._family.vae_stride
            image = picture_of(self._decode(unpacked(latents, picture.size.height // stride, picture.size.width // stride)))
            self._folder.mkdir(parents=True, exist_ok=True)
            facts = {"prompt": picture.prompt, "step": str(self._step), "sampling_step": str(done)}
            write_picture(self._folder / f"{picture.file_stem}.jpg", image, facts)
        except (RuntimeError, OSError, ValueError) as error:  # memory, a full disk, latents of another kind
            self._give_up(error)
            return
        self._show(self._step, picture.file_stem, picture.prompt, done, image)

    def _tiny(self) -> Decode | None:
        """A tiny autoencoder, if one is asked for or known, and at hand."""
        location = self._options.validation_preview_model or self._family.tiny_autoencoder
        if location is None or location == LINEAR:
            return None
        try:
            return tiny_decoder(location, self._device, torch.bfloat16 if self._device.type == "cuda" else torch.float32)
        except (OSError, ValueError) as error:  # no network, no such repository, a folder of something else
            why = str(error).strip().partition("\n")[0]
            self._console.say(f"note: previews show colours alone: {location} cannot be loaded ({why})")
            return None

    def _projection(self, vae: Any) -> Decode:
        def encode(pixels: Tensor) -> Tensor:
            return self._family.scale_latents(self._family.encode_pixels(vae, pixels)["mean"])

        return projection(encode, self._family.vae_stride, self._device)

    def _give_up(self, error: Exception) -> None:
        self._decode, self._is_off = None, True
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        self._console.warn(f"there are no previews any more: {why}")


def picture_of(colours: Tensor) -> Image.Image:
    """The first of (B, 3, H, W) in [-1, 1] as a picture, made smaller if it is large."""
    pixels = ((colours[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST_PX, LONGEST_PX))
    return image
