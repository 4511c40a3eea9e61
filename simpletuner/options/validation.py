"""Options of the pictures that show what the training has come to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from simpletuner.options.option import Section, option


class Validation(Section):
    """Which pictures are rendered to see what the training has come to, and when."""

    validation_prompt: str | None = option(None, ask="Prompt to render while training?")
    """Prompt that is rendered at every validation."""

    user_prompt_library: Path | None = option(None)
    """JSON file of further prompts: {"nickname": "the prompt"}; the nickname becomes the picture's file name. In place of the prompt may stand an
    object with `prompt` and what is different for it: `negative_prompt`, `resolution`, `seed`, `guidance`, `guidance_real`, `guidance_rescale`,
    `num_inference_steps`, `lycoris_strength` or `num_images`."""

    validation_prompt_library: bool = option(False, advanced=True)
    """Also render a small set of prompts that comes along: a portrait, a landscape, an animal, lettering, and so on."""

    validation_unconditional: bool = option(False, was_opposite=["validation_disable_unconditional"], advanced=True)
    """Also render the empty prompt, which shows what is learned whatever the words are."""

    validation_negative_prompt: str = option("blurry, cropped, ugly", may_be_empty=True)
    """What the pictures should not show; it has an effect with classifier-free guidance alone."""

    validation_resolution: str = option("256", ask="Size of validation pictures?")
    """Sizes to render, e.g. 1024x768, or 1024 for a square, or several with commas."""

    validation_start_image: Path | None = option(None, advanced=True)
    """Picture, or folder of pictures, that a model which improves pictures (the SDXL refiner) starts from, one prompt after the other; the
    first ones of the datasets if not given."""

    validation_guidance: float | None = option(None, ge=0)
    """How strongly pictures follow the prompt (classifier-free guidance); the family's own number if not given."""

    validation_guidance_real: float = option(1.0, ge=0, advanced=True)
    """Classifier-free guidance, with the negative prompt, of a model that is also told a guidance, such as Flux; 1 is none. It takes twice the
    time. For Flux 2 klein it is another word for `validation_guidance`, and wins where it is above 1."""

    validation_guidance_rescale: float = option(0.0, ge=0, le=1, advanced=True)
    """How far pictures of strong guidance are brought back to the contrast of those without (U-Net models); 0 is not at all."""

    validation_guidance_skip_layers: list[int] | None = option(None, advanced=True)
    """Blocks that Stable Diffusion 3 leaves out of a third prediction, from which pictures are led away; e.g. 7,8,9."""

    validation_guidance_skip_layers_start: float = option(0.01, ge=0, le=1, advanced=True)
    """Share of the sampling steps after which blocks are left out."""

    validation_guidance_skip_layers_stop: float = option(0.2, ge=0, le=1, advanced=True)
    """Share of the sampling steps after which they no longer are."""

    validation_guidance_skip_scale: float = option(2.8, ge=0, advanced=True)
    """How strongly pictures are led away from what is made without these blocks."""

    validation_noise_scheduler: Literal["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"] | None = option(None, advanced=True)
    """Sampler that makes the pictures; the one that the model came with, if not given."""

    validation_num_inference_steps: int = option(30, ge=1)
    """Steps in which a picture is rendered; fewer where the model's flavour is distilled to few."""

    validation_preview: bool = option(False, advanced=True)
    """Show pictures while they are being made, small: in `previews` of the output folder, in the live report, and by webhooks."""

    validation_preview_steps: int = option(1, ge=1, advanced=True)
    """Sampling steps between previews: with 5 and 20 sampling steps they come after the 5th, 10th, 15th and 20th."""

    validation_preview_model: str | None = option(None, advanced=True)
    """Tiny autoencoder (AutoencoderTiny of diffusers) that makes previews, a folder or a hub id; the family's own if not given. `linear` takes none:
    colours are then guessed from the latents, which costs next to nothing, and so it is where none can be loaded."""

    validation_seed: int | None = option(None, ge=0)
    """Seed of the pictures, so that they can be compared; that of the run if not given."""

    num_validation_images: int = option(1, ge=1)
    """Pictures of each prompt and size, with seeds that follow one another."""

    validation_step_interval: int = option(100, ask="Render every how many steps?", was=["validation_steps"], ge=0)
    """Optimizer steps between validations; 0 renders none while training."""

    validation_epoch_interval: int | None = option(None, ge=1, advanced=True)
    """Epochs between validations, besides those that `validation_step_interval` asks for."""

    validate_after_step: int = option(0, ge=0, advanced=True)
    """First optimizer step after which anything is rendered."""

    validate_after_epoch: int = option(0, ge=0, advanced=True)
    """Epochs that pass before anything is rendered."""

    validation_multigpu: Literal["batch-parallel", "single-gpu"] = option("batch-parallel", advanced=True)
    """Whether the pictures of a validation are spread over all processes, or rendered by the first one while the others wait."""

    validation_image_format: Literal["png", "webp", "jpeg"] = option("png", spellings={"jpg": "jpeg"}, advanced=True)
    """File format of the pictures; grids are always PNG."""

    validation_image_quality: int = option(90, ge=1, le=100, advanced=True)
    """Quality of webp and jpeg."""

    validation_on_startup: bool = option(False)
    """Also render before the first step, with the adapter as it starts or was resumed."""

    validation_disable: bool = option(False)
    """Render nothing at all."""

    disable_benchmark: bool = option(False)
    """Do not render the untouched base model, which otherwise stands first in the comparison."""

    validation_lycoris_strength: float = option(1.0, ge=0, advanced=True)
    """Strength of the adapter in the pictures."""

    eval_steps_interval: int = option(100, ge=0)
    """Optimizer steps between looks at the loss on held-out pictures (datasets of `dataset_type` eval), besides the first and the last
    step; 0 is these two alone."""

    eval_epoch_interval: float | None = option(None, gt=0, advanced=True)
    """The same in epochs, besides; a fraction is several times an epoch."""

    num_eval_images: int = option(4, ge=1)
    """Held-out pictures of each dataset that are looked at: always the same ones."""

    eval_timesteps: int = option(28, ge=1, le=500, advanced=True)
    """Noise levels, spread evenly from data to noise, at which each of them is looked at."""

    eval_dataset_id: str | None = option(None, advanced=True)
    """The one dataset to look at, where there are several of `dataset_type` eval."""

    eval_loss_disable: bool = option(False, advanced=True)
    """Do not look at held-out pictures at all."""

    evaluation_type: Literal["none", "clip"] = option("none", advanced=True)
    """Whether the pictures of validation are scored by how well they fit their prompts, with a CLIP."""

    pretrained_evaluation_model_name_or_path: str = option("openai/clip-vit-large-patch14-336", advanced=True)
    """The CLIP that scores them, a folder or a hub id."""

    best_checkpoint: Literal["loss", "clip"] = option("loss", advanced=True)
    """By what the best checkpoint is told: the loss on held-out pictures, or the CLIP score. It is named in best_checkpoint.json, and kept however
    many come after it."""

    early_stop_patience: int = option(0, ge=0, advanced=True)
    """End the run, as one that is done, once so many evaluations in a row were no better than the best by `best_checkpoint`; 0 never does."""

    ema_validation: Literal["none", "ema_only", "comparison"] = option("ema_only", advanced=True)
    """With `use_ema`, which weights are rendered: the trained ones (none), the averaged ones (ema_only), or both."""
