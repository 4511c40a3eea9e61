"""Stable Diffusion 2.x: a U-Net that predicts noise or velocity, with one OpenCLIP text encoder; pictures of 768 pixels."""

from __future__ import annotations

from typing import ClassVar

from simpletuner.models.stable_diffusion import StableDiffusion


class StableDiffusion2(StableDiffusion):
    modelspec_architecture = "stable-diffusion-v2-768-v"
    kohya_base = "sd_v2_768_v"
    flavours: ClassVar = {
        "2.1": "stabilityai/stable-diffusion-2-1",
        "2.0": "stabilityai/stable-diffusion-2",
        "pseudoflex-v2": "bghira/pseudo-flex-v2",
        "digitaldiffusion": "Junglerally/Digital-Diffusion",
        "pseudojourney": "bghira/pseudo-journey-v2",
    }
    billions: ClassVar = dict.fromkeys(flavours, 0.87)
    released_text_width = 1024
    releases_by_prediction: ClassVar = {"epsilon": "2.0-base or 2.1-base, of 512 pixels", "v_prediction": "2.0 or 2.1, of 768 pixels"}
