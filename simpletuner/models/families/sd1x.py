"""Stable Diffusion 1.x: a U-Net that predicts noise, with one CLIP text encoder; pictures of 512 pixels and little more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from simpletuner.models.recognise import Shapes
from simpletuner.models.stable_diffusion import StableDiffusion


class StableDiffusion1(StableDiffusion):
    modelspec_architecture = "stable-diffusion-v1"
    kohya_base = "sd_v1"
    flavours: ClassVar = {
        "dreamshaper": "Lykon/dreamshaper-8",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "1.4": "CompVis/stable-diffusion-v1-4",
    }
    billions: ClassVar = dict.fromkeys(flavours, 0.86)
    released_text_width = 768

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        """Any of them; the settings of a file are those of the model that most are made from."""
        return sorted(cls.flavours, key=lambda name: name != "1.5")
