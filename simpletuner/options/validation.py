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
    """JSON file of further prompts: {"nickname": "the prompt"}; the nickname becomes the picture's file name."""

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

    validation_num_inference_steps: int = option(30, ge=1)
    """Steps in which a picture is rendered; fewer where the model's flavour is distilled to few."""

    validation_seed: int | None = option(None, ge=0)
    """Seed of the pictures, so that they can be compared; that of the run if not given."""

    num_validation_images: int = option(1, ge=1)
    """Pictures of each prompt and size, with seeds that follow one another."""

    validation_step_interval: int = option(100, ask="Render every how many steps?", was=["validation_steps"], ge=0)
    """Optimizer steps between validations; 0 renders none while training."""

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

    num_eval_images: int = option(4, ge=1)
    """Held-out pictures of each dataset that are looked at: always the same ones."""

    eval_timesteps: int = option(28, ge=1, le=500, advanced=True)
    """Noise levels, spread evenly from data to noise, at which each of them is looked at."""

    eval_dataset_id: str | None = option(None, advanced=True)
    """The one dataset to look at, where there are several of `dataset_type` eval."""

    eval_loss_disable: bool = option(False, advanced=True)
    """Do not look at held-out pictures at all."""

    ema_validation: Literal["none", "ema_only", "comparison"] = option("ema_only", advanced=True)
    """With `use_ema`, which weights are rendered: the trained ones (none), the averaged ones (ema_only), or both."""
