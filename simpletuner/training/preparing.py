"""What is done before the denoiser is loaded: refuse what can be refused, then fill the caches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from simpletuner.adapters.adapter import Adapter
from simpletuner.console import Console
from simpletuner.data.sampler import Sampler
from simpletuner.errors import ConfigError
from simpletuner.memory.offload import check_offload, is_asked_for
from simpletuner.models.family import ModelFamily
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.optim.notes import notes as optimizer_notes
from simpletuner.optim.rules import check_release
from simpletuner.optim.scaling import scaling_notes
from simpletuner.options.train_config import TrainConfig
from simpletuner.reporting.events import Events
from simpletuner.training.assistant import Assistant, find_assistant
from simpletuner.training.assistant_rules import assistant_notes
from simpletuner.training.attention import Attention, attention_of
from simpletuner.training.base import check_goes_on, check_precisions, trained_dtype
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.caching import Caches, fill_caches
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.datasets import Datasets, find_datasets
from simpletuner.training.finish import call_arguments
from simpletuner.training.live_text import LiveText, live_text
from simpletuner.training.machine import start_accelerator
from simpletuner.training.plan import Plan
from simpletuner.training.plan_check import plan_start
from simpletuner.training.prompts import Picture, pictures, prompts_to_show
from simpletuner.training.publishing import find_repository
from simpletuner.training.resume import find
from simpletuner.training.run_folder import locked, make_writable
from simpletuner.training.signals import StopRequest
from simpletuner.training.starts import check_starts, with_starts
from simpletuner.training.text_rules import check_text_training


@dataclass(frozen=True, slots=True)
class Prepared:
    """What there is before the denoiser is loaded."""

    family: ModelFamily
    adapter: Adapter
    assistant: Assistant
    attention: Attention
    accelerator: Accelerator
    shown: list[Picture]
    """What validation renders."""
    arguments: Mapping[str, object]
    caches: Caches
    text: LiveText | None
    """Encodes what is not cached, where text encoders are trained."""
    sampler: Sampler
    plan: Plan | None
    """Of the memory; none where none was asked for or could be made, and on all processes but the first."""
    repository: str
    """Where the result is published; empty if it is not, and on all processes but the first."""


def prepare(config: TrainConfig, console: Console, variables: Mapping[str, str], stop: StopRequest, held: ExitStack, events: Events) -> Prepared:
    """Refuse what can be refused, then fill the caches.

    Args:
        held: gets what must be let go of when the run is over.
    """
    output_dir = Path(config.training.output_dir)
    family = build_family(config)
    family.check_source()
    adapter = build_adapter(config, family)
    find_optimizer(config.optim.optimizer)
    of_release: list[str] = []
    if adapter.trains_base:
        trained_dtype(config)
        of_release = check_release(config.optim)
    shown = pictures(config.validation, config.training.seed, family)
    check_starts(config, family, shown)
    accelerator = start_accelerator(config)
    check_precisions(config.memory, accelerator.device)
    if is_asked_for(config.memory):
        check_offload(family.empty_denoiser(), config.memory, accelerator.device)
    attention = attention_of(config.memory, family, accelerator.device)
    make_writable(output_dir)
    if accelerator.is_main_process:
        held.enter_context(locked(output_dir))
    repository = find_repository(config, accelerator.is_main_process, console)
    of_model = (*family.notes(), *family.objective_notes(config.diffusion), *assistant_notes(config, family), *check_text_training(config, family))
    of_rate = (*optimizer_notes(config.optim), *scaling_notes(config.optim, config.training.images_per_step))
    for note in (*of_model, *of_rate, *of_release):
        console.say(f"note: {note}")
    datasets = find_datasets(config, family, variables, console, accelerator)
    refuse_regularisation_of_full(adapter, datasets)

    sampler = datasets.sampler(config, accelerator, console)
    plan = plan_start(config, datasets, accelerator.device, console, stop) if accelerator.is_main_process else None
    check_goes_on(config, family, find(config.training.resume_from_checkpoint, CheckpointFolder(output_dir, None, lambda text: None)))
    if config.adapters.init_lora and not config.adapters.init_lora.exists():
        raise ConfigError(f"init_lora {config.adapters.init_lora} does not exist", hint="Give a folder that a run saved, or a .safetensors file.")
    shown = with_starts(shown, config, family, datasets)
    arguments = call_arguments(config, family)
    assistant = find_assistant(config, family)
    for note in assistant.notes:
        console.say(f"note: {note}")

    # Text encoders and VAE come and go, one after the other, before the denoiser comes to stay.
    caches = fill_caches(config, family, datasets, prompts_to_show(shown), console, accelerator, events.stage)
    if caches.datasets is not datasets:  # images turned out to be damaged when they were read
        datasets = caches.datasets
        sampler = datasets.sampler(config, accelerator, console)
    held.callback(datasets.book.save)
    held.callback(caches.let_go)
    text = live_text(config, family, adapter, caches.trained_encoders, caches.embeds.read)
    return Prepared(family, adapter, assistant, attention, accelerator, shown, arguments, caches, text, sampler, plan, repository)


def refuse_regularisation_of_full(adapter: Adapter, datasets: Datasets) -> None:
    """Regularisation pictures are trained towards what the untouched model answers, and `full` leaves none untouched."""
    wrong = [dataset.id for dataset in datasets.plan.datasets if dataset.is_regularisation]
    if adapter.trains_base and wrong:
        raise ConfigError(
            f"is_regularisation_data in {', '.join(wrong)} needs an adapter: with model_type full no untouched model is left to ask",
            hint="Set model_type to lora, or drop the key.",
        )
