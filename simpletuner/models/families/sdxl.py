"""Stable Diffusion XL: a U-Net that predicts noise or velocity, told the sizes of the image, with two CLIP text encoders; and its refiner.

Letters: B batch, C latent channels, h w latent pixels, T text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.errors import ConfigError
from simpletuner.models.clip import encode_penultimate
from simpletuner.models.recognise import REFINER_TEXT_WIDTH, Shapes, unet_text_width
from simpletuner.models.source import is_local, is_nothing
from simpletuner.models.text import TextEncoder, pooled_width_of, width_of
from simpletuner.models.unet import UNetFamily
from simpletuner.models.usual import pooled_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.options.diffusion import Diffusion
    from simpletuner.options.models import Models
    from simpletuner.types import Batch, Noised, Sample

REFINER_FLAVOURS = ("refiner-1.0", "refiner-0.9")
REFINER_STRENGTH = 0.2
"""Share of the steps, the least noisy ones, that the released refiners were trained on (Podell et al. 2023, section 2.5)."""


class StableDiffusionXL(UNetFamily):
    flavours: ClassVar = {
        "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
        "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
        "refiner-1.0": "stabilityai/stable-diffusion-xl-refiner-1.0",
        "refiner-0.9": "stabilityai/stable-diffusion-xl-refiner-0.9",
    }
    billions: ClassVar = {"base-1.0": 2.57, "base-0.9": 2.57, "refiner-1.0": 2.3, "refiner-0.9": 2.3}
    defaults: ClassVar = {"validation_guidance": 5.0}
    flavour_defaults: ClassVar = {"refiner-1.0": {"refiner_training": True}, "refiner-0.9": {"refiner_training": True}}
    idle: Mapping[str, str] = {"data_aesthetic_score validation_start_image": "they are for the refiner"}
    parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "unet", "scheduler")
    text_parts: Sequence[tuple[str, str]] = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    tiny_autoencoder = "madebyollin/taesdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    risky_layers: ClassVar = {
        "*.ff.net.*": "adapters on feed-forward layers of SDXL are known to end in NaN at times; leave FeedForward out of the targets if that happens"
    }
    original_layout = "sdxl"
    own_options = ("data_aesthetic_score", "validation_start_image")
    adaptable_text: Mapping[str, str] = {"text_encoder.text_model": "clip_l", "text_encoder_2.text_model": "clip_g"}
    text_prefixes: ClassVar = {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": ("conditioner.embedders.1.", "conditioner.embedders.0.model."),  # the latter in a refiner
    }
    modelspec_architecture = "stable-diffusion-xl-v1-base"
    kohya_base: str | None = "sdxl_base_v1-0"

    def __init__(self, options: Models) -> None:
        super().__init__(options)
        self.is_refiner = self._find_refiner()
        if self.is_refiner:  # it lacks the first text encoder, and improves pictures that it is given
            self.parts = tuple(name for name in self.parts if name not in self.text_parts[0])
            self.text_parts = self.text_parts[1:]
            self.pipeline_class = "StableDiffusionXLImg2ImgPipeline"
            self.adaptable_text = {"text_encoder_2.text_model": "clip"}
            self.modelspec_architecture, self.kohya_base = "stable-diffusion-xl-v1-refiner", None
            self.idle = {}

    def _find_refiner(self) -> bool:
        """Whether the model is a refiner: as its own list of parts says, or its flavour. Asks nothing of the hub."""
        try:
            if not self.source.knows(""):
                return self.options.model_flavour in REFINER_FLAVOURS
            if is_local(self.source.base):
                return is_nothing(self.source.index.get("text_encoder"))
            return self.source.flavour in REFINER_FLAVOURS
        except ConfigError:  # `check_source` has more to say of it
            return False

    def check_source(self) -> None:
        super().check_source()
        flavour = self.options.model_flavour
        if flavour is not None and self.source.knows("") and is_local(self.source.base) and (flavour in REFINER_FLAVOURS) != self.is_refiner:
            kind = "a refiner" if self.is_refiner else "no refiner: it has both text encoders"
            raise ConfigError(f"model_flavour {flavour} does not fit {self.source_name()}, which is {kind}", hint="Leave model_flavour out.")

    @classmethod
    def flavours_of(cls, denoiser: Shapes) -> Sequence[str]:
        return REFINER_FLAVOURS if unet_text_width(denoiser) == REFINER_TEXT_WIDTH else ("base-1.0", "base-0.9")

    def objective_notes(self, options: Diffusion) -> list[str]:
        found = super().objective_notes(options)
        if self.is_refiner and not options.refiner_training:
            found.append("all steps are trained, and a refiner is asked at the least noisy ones alone: refiner_training trains those")
        return found

    # Text.

    def encode_text(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D), the encoders' states side by side, and `pooled` (B, P) of the last."""
        import torch

        encoded = [encode_penultimate(text, prompts) for text in encoders]
        return {"prompt": torch.cat([states for states, _ in encoded], dim=-1), "pooled": encoded[-1][1]}

    def text_shapes(self, encoders: Sequence[Mapping[str, Any] | None]) -> Mapping[str, tuple[int, ...]]:
        widths = [width_of(config, released) for config, released in zip(reversed(encoders), (1280, 768))]
        return {"prompt": (self.text_tokens, sum(widths)), "pooled": (pooled_width_of(encoders[-1], 1280),)}

    # Training.

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """Noise, velocity or data, as the schedule says, (B, C, h, w)."""
        import torch

        device, dtype = noised.latents.device, next(denoiser.parameters()).dtype
        sizes = torch.tensor([self._told(sample) for sample in batch.samples], dtype=dtype)
        prediction: Tensor = denoiser(
            noised.latents.to(dtype),  # (B, C, h, w)
            self.timesteps(noised.time),  # (B,)
            encoder_hidden_states=batch.text["prompt"].to(device, dtype),  # (B, T, D)
            added_cond_kwargs={"text_embeds": batch.text["pooled"].to(device, dtype), "time_ids": sizes.to(device, non_blocking=True)},
            return_dict=False,
        )[0]
        return prediction

    def _told(self, sample: Sample) -> tuple[float, ...]:
        """What the U-Net is told of a picture: the refiner how good it is, in place of its size."""
        sizes = size_conditioning(sample)
        return (*sizes[:4], self.options.data_aesthetic_score) if self.is_refiner else sizes

    # Looking.

    def pipeline(self, denoiser: nn.Module, vae: nn.Module, options: Diffusion) -> Any:
        other = {"requires_aesthetics_score": True, "text_encoder": None, "tokenizer": None} if self.is_refiner else {}
        return self.pipeline_around(denoiser, vae, self.sampling_schedule(options), add_watermarker=False, **other)

    def pipeline_inputs(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return pooled_inputs(text, negative)

    def pipeline_call_arguments(self, guidance: float | None) -> dict[str, Any]:
        scored = {"aesthetic_score": self.options.data_aesthetic_score} if self.is_refiner else {}
        return {**super().pipeline_call_arguments(guidance), **scored}

    def start_strength(self, options: Diffusion) -> float | None:
        if not self.is_refiner:
            return None
        return options.refiner_training_strength if options.refiner_training else REFINER_STRENGTH


def size_conditioning(sample: Sample) -> tuple[int, int, int, int, int, int]:
    """Height and width of the image as it was, top and left of the crop in the resized one, height and width of the picture.

    In this order the model was trained on them (Podell et al. 2023, section 2.2) and the pipeline gives them.
    """
    original, crop = sample.geometry.original, sample.geometry.crop
    return original.height, original.width, crop.top, crop.left, crop.height, crop.width
