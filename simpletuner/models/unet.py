"""What families with a U-Net have in common: discrete noise steps, a 4-channel VAE, sizes, and the options of epsilon and v prediction.

Letters: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.diffusion.denoising import Denoising, Offset, Perturbation, biased, restricted
from simpletuner.errors import ConfigError
from simpletuner.models.clip import TOKENS
from simpletuner.models.offline import config_here
from simpletuner.models.text import TextEncoder, count_tokens
from simpletuner.models.usual import RELEASED_ALIGNMENT_PX, UsualFamily

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.options.diffusion import Diffusion

PIPELINE_STEP_PX = 8
"""The pipelines of diffusers refuse sides that are no multiple of this."""


class UNetFamily(UsualFamily):
    """A family around UNet2DConditionModel. Text and the call itself are the family's own."""

    denoiser_folder = "unet"
    denoiser_class = "UNet2DConditionModel"
    objective: ClassVar = "denoising"
    class_aliases: ClassVar = {
        "Attention": ("Attention",),
        "FeedForward": ("FeedForward",),
        "TransformerBlock": ("BasicTransformerBlock",),
        "Transformer2DModel": ("Transformer2DModel",),
        "ResnetBlock2D": ("ResnetBlock2D",),
        "Downsample2D": ("Downsample2D",),
        "Upsample2D": ("Upsample2D",),
    }
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    # Before anything is loaded.

    @property
    def alignment_px(self) -> int:
        """64 for the released models; for a smaller one the step in which its U-Net halves sizes without rounding."""
        if self.source.is_released and not (self.source.is_replaced("unet") or self.source.is_replaced("vae")):
            return RELEASED_ALIGNMENT_PX
        halvings = len(self.denoiser_config.get("block_out_channels", [0] * 4)) - 1
        return min(RELEASED_ALIGNMENT_PX, math.lcm(self.step_px, self.vae_stride * 2**halvings))

    @property
    def step_px(self) -> int:
        return math.lcm(PIPELINE_STEP_PX, self.vae_stride)

    def notes(self) -> list[str]:
        found = super().notes()
        if self.options.tokenizer_max_length not in (None, TOKENS):
            found.append(f"tokenizer_max_length has no effect: the CLIP encoders of {self.options.model_family} read {TOKENS} tokens")
        checkpoint = self.source.denoiser_checkpoint() if self.source.knows("unet") else None
        if checkpoint is not None and checkpoint.schedule:
            said = ", ".join(f"{key} {json.dumps(value)}" for key, value in checkpoint.schedule.items())
            found.append(f"{checkpoint.name} sets {said}, by {checkpoint.schedule_marks}")
        return found

    def objective_notes(self, options: Diffusion) -> list[str]:
        is_known = self.source.knows("unet") and self.source.knows("scheduler")
        scheduler = self.source.part("scheduler") if is_known else None
        own = config_here(scheduler) if scheduler is not None else None
        if own is None:
            return []
        changes = self.schedule_changes(options)
        usual = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        return [
            f"{key} {json.dumps(value)} is trained, though {self.source_name()} says {json.dumps(own.get(key, usual.get(key)))} of itself"
            for key, value in changes.items()
            if value != own.get(key, usual.get(key))
        ]

    # Text.

    def count_tokens(self, encoders: Sequence[TextEncoder], prompts: Sequence[str]) -> list[int]:
        return count_tokens(encoders[0].tokenizer, prompts)

    @property
    def text_tokens(self) -> int:
        return TOKENS

    def pipeline_text_arguments(self) -> dict[str, Any]:
        return {}

    # Training.

    def process(self, options: Diffusion) -> Denoising:
        schedule = self.training_schedule(options)
        total = len(schedule.alphas_cumprod)
        bias = (options.timestep_bias_strategy, options.timestep_bias_portion, options.timestep_bias_multiplier)
        return Denoising(
            alphas=tuple(schedule.alphas_cumprod.tolist()),
            prediction=schedule.config.prediction_type,
            weights=(
                restricted(total, options.refiner_training_strength, options.refiner_training_invert_schedule)
                if options.refiner_training
                else biased(total, *bias, options.timestep_bias_begin, options.timestep_bias_end)
            ),
            is_stratified=not options.disable_segmented_timestep_sampling,
            snr_gamma=options.snr_gamma,
            snr_weight=options.snr_weight,
            offset=Offset(options.noise_offset, options.noise_offset_probability) if options.offset_noise else None,
            perturbation=Perturbation(options.input_perturbation, options.input_perturbation_steps) if options.input_perturbation else None,
            learns_flow=options.diff2flow_enabled and options.diff2flow_loss,
        )

    def training_schedule(self, options: Diffusion) -> Any:
        """The model's own noise schedule as a DDPMScheduler of diffusers, with what the options change in it.

        Raises:
            ConfigError: the model ends in pure noise, of which a prediction of the noise tells nothing.
        """
        from diffusers import DDPMScheduler

        changes = self.schedule_changes(options)
        schedule = DDPMScheduler.from_config(self.source.part("scheduler").config(), **changes)
        if schedule.config.rescale_betas_zero_snr and schedule.config.prediction_type == "epsilon":
            raise ConfigError(
                "rescale_betas_zero_snr makes the last step pure noise, from which a model with prediction_type epsilon cannot learn",
                hint="Set prediction_type to v_prediction, or rescale_betas_zero_snr to false.",
            )
        return schedule

    def schedule_changes(self, options: Diffusion) -> dict[str, Any]:
        """What the options change in the model's schedule, for training and for sampling alike."""
        changes: dict[str, Any] = {}
        if options.prediction_type is not None:
            changes["prediction_type"] = options.prediction_type
        if options.rescale_betas_zero_snr is not None:
            changes["rescale_betas_zero_snr"] = options.rescale_betas_zero_snr
        return changes

    def sampling_schedule(self, options: Diffusion) -> Any:
        """The sampler that the model came with, with the same changes."""
        changes = self.schedule_changes(options)
        if options.inference_scheduler_timestep_spacing is not None:
            changes["timestep_spacing"] = options.inference_scheduler_timestep_spacing
        if changes.get("rescale_betas_zero_snr"):
            changes["timestep_spacing"] = "trailing"  # the others never ask for the last step, where there is nothing but noise
        return self.sampler(**changes)

    def tokens(self, latents: Tensor) -> int:
        return int(latents.shape[-2] * latents.shape[-1])

    def timesteps(self, time: Tensor) -> Tensor:
        """Times in [0, 1] as the whole steps that the U-Net is told."""
        return (time * self._total_steps).round().long()

    @cached_property
    def _total_steps(self) -> int:
        return int(self.source.part("scheduler").config().get("num_train_timesteps", 1000))
