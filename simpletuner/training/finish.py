"""The end of a run: the finished adapter or pipeline in the output folder, and how to use it."""

from __future__ import annotations

import math
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from simpletuner import __version__
from simpletuner.adapters.adapter import ADAPTER_FILE, Adapter
from simpletuner.console import Console
from simpletuner.data.plan import DataPlan
from simpletuner.diffusion.denoising import Denoising
from simpletuner.models.family import ModelFamily
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.report.state import PAGE_FILE
from simpletuner.training.layouts import OWN, write_in_place
from simpletuner.training.prompts import named_prompts, parse_size
from simpletuner.training.run_folder import save_config, without_paths
from simpletuner.training.summary import show_end
from simpletuner.training.trainer import Trainer

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""What diffusers calls what a model predicts, to the model specification's word."""
LOCATIONS = (
    "pretrained_model_name_or_path",
    "single_file_base_model",
    "pretrained_transformer_model_name_or_path",
    "pretrained_unet_model_name_or_path",
    "pretrained_vae_model_name_or_path",
)
"""Options that say where the model is; the saved settings keep the last part of an absolute path alone."""


def metadata_of(config: TrainConfig, family: ModelFamily, triggers: Sequence[str] = ()) -> dict[str, str]:
    """What an adapter file tells of where it comes from; no absolute paths, and no captions but what was one for all images.

    Besides our own words, those of the model specification 1.0.1 of Stability AI, which user interfaces show, and those of kohya's
    scripts by which other tools tell what an adapter is for.

    Args:
        triggers: captions of whole datasets.
    """
    name = config.models.model_family
    base, size = str(without_paths(family.source_name())), edge_px(config)
    phrases = list(dict.fromkeys(phrase for phrase in (*triggers, config.data.instance_prompt) if phrase))
    process = family.process(config.diffusion)
    return {
        "software": f"SimpleTuner {__version__}",
        "model_family": name,
        "base_model": base,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec_architecture or name}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": Path(config.training.output_dir).name or name,
        "modelspec.resolution": f"{size}x{size}",
        **({"modelspec.prediction_type": PREDICTIONS[process.prediction]} if isinstance(process, Denoising) else {}),
        **({"modelspec.trigger_phrase": ", ".join(phrases)} if phrases else {}),
        **({"modelspec.comment": config.hub.modelspec_comment} if config.hub.modelspec_comment else {}),
        "ss_base_model_version": family.kohya_base or name,
        "ss_sd_model_name": base,
        "ss_resolution": f"({size}, {size})",
    }


def triggers_of(plan: DataPlan) -> list[str]:
    """The captions that whole datasets share, but for those that show what is not to be learned."""
    return [prompt for dataset in plan.datasets if not dataset.is_regularisation for prompt in dataset.captions.instance_prompts]


def edge_px(config: TrainConfig) -> int:
    """A side of the square of as many pixels as the pictures that were trained on."""
    if config.data.resolution_type == "area":  # megapixels
        return round(math.sqrt(config.data.resolution * 1e6))
    return round(config.data.resolution)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run ends with."""

    folder: Path
    """Holds what validation showed last: the adapter, its averaged twin, or the pipeline."""
    files: tuple[Path, ...]


def finish(trainer: Trainer, family: ModelFamily, denoiser: nn.Module, config: TrainConfig) -> Result:
    """Write the final files; the first process alone writes."""
    output_dir = Path(config.training.output_dir)
    pipeline = output_dir / "pipeline"
    if trainer.adapter.trains_base:
        if trainer.accelerator.is_main_process:
            # A pipeline has room for one set of weights; the smoothed ones are what use_ema is for.
            with trainer.ema.swapped_in() if trainer.ema else nullcontext():
                family.save_pipeline(denoiser, pipeline)
            save_config(output_dir, config.flat())
        return Result(pipeline, (pipeline,))
    folders = [output_dir, output_dir / "ema"] if trainer.ema else [output_dir]
    if trainer.accelerator.is_main_process:
        metadata = {**trainer.metadata, "step": str(trainer.state.step)}
        for folder, weights in zip(folders, (nullcontext(), trainer.ema.swapped_in() if trainer.ema else nullcontext())):
            with weights:
                replace_files(folder, lambda staged: save_last(trainer.adapter, staged, metadata, config, family))
        save_config(output_dir, config.flat())
    shows_average = trainer.ema is not None and config.validation.ema_validation != "none"
    return Result(folders[-1] if shows_average else output_dir, tuple(folder / ADAPTER_FILE for folder in folders))


def show_result(
    console: Console,
    trainer: Trainer,
    family: ModelFamily,
    config: TrainConfig,
    result: Result,
    arguments: Mapping[str, object],
    grid: Path | None,
    seconds: str,
) -> None:
    """Say where everything is, and how to use it.

    Args:
        arguments: of the plain pipeline's call.
        grid: the grid of validation pictures, if there is one.
        seconds: how long the run took, in words.
    """
    layout, recovered = config.adapters.lora_format, trainer.recovery.describe()
    # Else no two lines of diffusers load it as it was trained.
    loads_by_name = family.source.loads_by_name and layout == OWN
    snippet = trainer.adapter.snippet(family.pipeline_class, family.source_name(), arguments, str(result.folder)) if loads_by_name else None
    report = Path(config.training.output_dir) / PAGE_FILE
    files = (*result.files, report) if config.reporting.run_report and report.is_file() else result.files
    show_end(console, files, grid, generate_line(config, result, arguments), snippet, seconds)
    if layout != OWN and config.adapters.model_type == "lora":
        console.say(f"note: the adapter is in the layout {layout}; `simpletuner export --format diffusers` or lycoris writes it for Python")
    if trainer.ends_early:
        console.say(f"note: it ended at step {trainer.state.step} of {trainer.pace.total_steps}: evaluations got no better (early_stop_patience)")
    if trainer.progress is not None and (best := trainer.progress.note()):
        console.say(f"note: {best}")
    if recovered:
        console.say(f"note: {recovered}")


def save_last(adapter: Adapter, folder: Path, metadata: Mapping[str, str], config: TrainConfig, family: ModelFamily) -> None:
    """Write an adapter as a run leaves it, in the layout that was asked for."""
    adapter.save(folder, metadata)
    write_in_place(folder, config, family)


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an empty folder, then put its files into `folder`: an earlier result is there whole until then."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".finished-") as name:
        staged = Path(name)
        write(staged)
        for path in sorted(staged.iterdir()):
            os.replace(path, folder / path.name)


def generate_line(config: TrainConfig, result: Result, arguments: Mapping[str, object]) -> str:
    """The command that renders a picture with what a run ended with.

    Args:
        arguments: of the plain pipeline's call.
    """
    prompt = next((one.text for one in named_prompts(config.validation).values()), "your prompt")
    is_whole = config.adapters.model_type == "full"  # the pipeline needs no base
    words = ["simpletuner", "generate", prompt, "--adapter", str(config.training.output_dir if is_whole else result.folder)]
    shows_assistant = bool(config.adapters.assistant_lora_inference_strength)
    for key in () if is_whole else (*LOCATIONS, *(["assistant_lora_path"] if shows_assistant else [])):
        value = config.value(key)
        if without_paths(value) != value:
            words += [f"--{key}", value]
    start = str(config.validation.validation_start_image or "")
    if "image" in arguments and (not start or without_paths(start) != start):
        words += ["--image", start or str(arguments["image"])]
    return shlex.join(words)


def call_arguments(config: TrainConfig, family: ModelFamily) -> dict[str, object]:
    """The arguments that make the plain pipeline render as validation did."""
    options = config.validation
    size = parse_size(options.validation_resolution.split(",")[0], family.alignment_px)
    strength, start = family.start_strength(config.diffusion), options.validation_start_image
    is_file = start is not None and start.is_file()
    return {
        "prompt": next((one.text for one in named_prompts(options).values()), "your prompt"),
        "negative_prompt": options.validation_negative_prompt,
        **({} if strength is None else {"image": str(start) if is_file else "input.png", "strength": strength}),
        "width": size.width,
        "height": size.height,
        "num_inference_steps": options.validation_num_inference_steps,
        **family.guidance_arguments(options),
        **family.pipeline_text_arguments(),
        "seed": config.training.seed if options.validation_seed is None else options.validation_seed,
    }
