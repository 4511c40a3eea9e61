"""What families that learn to take noise away in discrete steps share: the schedule of the noise, and the options of what is predicted.

Letters: B batch, C latent channels, h w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.diffusion.denoising import Denoising, Offset, Perturbation, biased, restricted
from simpletuner.errors import ConfigError
from simpletuner.models.offline import config_here
from simpletuner.models.single_file import is_single_file
from simpletuner.models.usual import UsualFamily

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.options.diffusion import Diffusion


class DenoisingFamily(UsualFamily):
    """A family whose denoiser predicts the noise, the velocity or the data, as the model's own schedule says."""

    objective: ClassVar = "denoising"
    releases_by_prediction: ClassVar[Mapping[str, str]] = {}
    """If models of the family predict either the noise or the velocity, which their weights do not show: prediction_type to the releases
    of which a model with it was made."""

    # Before anything is loaded.

    def notes(self) -> list[str]:
        found = super().notes()
        checkpoint = self.source.denoiser_checkpoint() if self.source.knows(self.denoiser_folder) else None
        if checkpoint is not None and checkpoint.schedule:
            said = ", ".join(f"{key} {json.dumps(value)}" for key, value in checkpoint.schedule.items())
            found.append(f"{checkpoint.name} sets {said}, by {checkpoint.schedule_marks}")
        return found

    def objective_notes(self, options: Diffusion) -> list[str]:
        if self.source.knows(self.denoiser_folder):
            self._check_prediction(options)
        is_known = self.source.knows(self.denoiser_folder) and self.source.knows("scheduler")
        scheduler = self.source.part("scheduler") if is_known else None
        own = config_here(scheduler) if scheduler is not None else None
        if own is None:
            return []
        changes = self.schedule_changes(options)
        usual = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        checkpoint = self.source.denoiser_checkpoint() if self.releases_by_prediction and options.prediction_type is None else None
        if checkpoint is not None and "prediction_type" not in checkpoint.schedule:
            said = json.dumps(own.get("prediction_type", "epsilon"))
            return [f"{checkpoint.name} does not say what it predicts: prediction_type {said} is that of {self.source.base}"]
        return [
            f"{key} {json.dumps(value)} is trained, though {self.source_name()} says {json.dumps(own.get(key, usual.get(key)))} of itself"
            for key, value in changes.items()
            if value != own.get(key, usual.get(key))
        ]

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
        """What the options change in the model's schedule, for training and for sampling alike.

        Raises:
            ConfigError: nothing says what the model predicts.
        """
        self._check_prediction(options)
        changes: dict[str, Any] = {}
        if options.prediction_type is not None:
            changes["prediction_type"] = options.prediction_type
        if options.rescale_betas_zero_snr is not None:
            changes["rescale_betas_zero_snr"] = options.rescale_betas_zero_snr
        return changes

    def _check_prediction(self, options: Diffusion) -> None:
        """Refuse to guess what a model in a single file predicts: neither its weights nor the flavour whose settings it takes can tell."""
        models, checkpoint = self.options, self.source.denoiser_checkpoint() if self.releases_by_prediction else None
        if checkpoint is None or options.prediction_type is not None or "prediction_type" in checkpoint.schedule:
            return
        given = models.pretrained_model_name_or_path
        if models.single_file_base_model is None and (given is None or is_single_file(given)):
            choices = " or to ".join(f"{prediction} (what was made from {releases})" for prediction, releases in self.releases_by_prediction.items())
            raise ConfigError(
                f"{checkpoint.name} does not say what it predicts: {checkpoint.kind.title} may predict the noise or the velocity",
                hint=f"Set prediction_type to {choices}, or single_file_base_model to the model in diffusers layout that it was made from.",
            )

    def sampling_schedule(self, options: Diffusion) -> Any:
        """The sampler that the model came with, with the same changes."""
        changes = self.schedule_changes(options)
        if options.inference_scheduler_timestep_spacing is not None:
            changes["timestep_spacing"] = options.inference_scheduler_timestep_spacing
        if changes.get("rescale_betas_zero_snr"):
            changes["timestep_spacing"] = "trailing"  # the others never ask for the last step, where there is nothing but noise
        return self.sampler(**changes)

    def timesteps(self, time: Tensor) -> Tensor:
        """Times in [0, 1] as the whole steps that the denoiser is told."""
        return (time * self._total_steps).round().long()

    @cached_property
    def _total_steps(self) -> int:
        return int(self.source.part("scheduler").config().get("num_train_timesteps", 1000))
