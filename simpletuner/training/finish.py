"""The end of a run: the finished adapter or pipeline in the output folder, and how to use it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from simpletuner import __version__
from simpletuner.adapters.adapter import ADAPTER_FILE
from simpletuner.console import Console, duration
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.training.prompts import named_prompts, parse_size
from simpletuner.training.run_folder import save_config, without_paths
from simpletuner.training.summary import show_end
from simpletuner.training.trainer import Trainer
from simpletuner.training.validator import Validator


def metadata_of(config: TrainConfig, family: ModelFamily) -> dict[str, str]:
    """What an adapter file tells of where it comes from; no absolute paths."""
    return {
        "software": f"SimpleTuner {__version__}",
        "model_family": config.models.model_family,
        "base_model": str(without_paths(family.source_name())),
    }


def finish(
    trainer: Trainer, family: ModelFamily, denoiser: nn.Module, validator: Validator, config: TrainConfig, console: Console, seconds: float
) -> None:
    """Write the final files and say where they are."""
    output_dir = Path(config.training.output_dir)
    if not trainer.accelerator.is_main_process:
        return
    metadata = {**trainer.metadata, "step": str(trainer.state.step)}
    results: list[Path] = []
    if trainer.adapter.trains_base:
        # A pipeline has room for one set of weights; the smoothed ones are what use_ema is for.
        with trainer.ema.swapped_in() if trainer.ema else nullcontext():
            family.save_pipeline(denoiser, output_dir / "pipeline")
        results.append(output_dir / "pipeline")
    else:
        trainer.adapter.save(output_dir, metadata)
        results.append(output_dir / ADAPTER_FILE)
        if trainer.ema:
            folder = output_dir / "ema"
            folder.mkdir(exist_ok=True)
            with trainer.ema.swapped_in():
                trainer.adapter.save(folder, metadata)
            results.append(folder / ADAPTER_FILE)
    save_config(output_dir, config.flat())
    snippet = trainer.adapter.snippet(family.pipeline_class, family.source_name(), call_arguments(config, family), os.fspath(output_dir))
    show_end(console, results, validator.grid, snippet, duration(seconds))


def call_arguments(config: TrainConfig, family: ModelFamily) -> dict[str, object]:
    """The arguments that make the plain pipeline render as validation did."""
    options = config.validation
    size = parse_size(options.validation_resolution.split(",")[0], family.alignment_px)
    return {
        "prompt": next(iter(named_prompts(options).values()), "your prompt"),
        "negative_prompt": options.validation_negative_prompt,
        "width": size.width,
        "height": size.height,
        "num_inference_steps": options.validation_num_inference_steps,
        "guidance_scale": options.validation_guidance,
        **family.pipeline_text_arguments(),
        "seed": config.training.seed if options.validation_seed is None else options.validation_seed,
    }
