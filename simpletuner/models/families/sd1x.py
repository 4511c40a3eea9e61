"""Stable Diffusion 1.x: a U-Net that predicts noise, with one CLIP text encoder; pictures of 512 pixels and little more."""

from typing import ClassVar

from simpletuner.models.stable_diffusion import StableDiffusion


class StableDiffusion1(StableDiffusion):
    modelspec_architecture = "stable-diffusion-v1"
    kohya_base = "sd_v1"
    flavours: ClassVar = {
        "dreamshaper": "Lykon/dreamshaper-8",
        "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "1.4": "CompVis/stable-diffusion-v1-4",
    }
