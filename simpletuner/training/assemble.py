"""Put a run together, in the order that memory allows, and run it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from simpletuner import plugins
from simpletuner.adapters.adapter import Adapter, Attached, Targets, kind_of
from simpletuner.console import Console, duration
from simpletuner.data.sampler import Sampler
from simpletuner.errors import ConfigError
from simpletuner.memory.precision import quantise
from simpletuner.memory.residency import weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.optim.build import build_optimizer, build_schedule
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.optim.notes import notes as optimizer_notes
from simpletuner.options.load import Loaded
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.reporting.tracker import Trackers, start_trackers
from simpletuner.training.caching import Caches, fill_caches
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.datasets import Datasets, find_datasets, total_steps
from simpletuner.training.ema import Ema
from simpletuner.training.evaluator import Evaluator
from simpletuner.training.finish import call_arguments, finish, generate_line, metadata_of, triggers_of
from simpletuner.training.machine import start_accelerator
from simpletuner.training.objective import loss_of, scheduled_sampling_of
from simpletuner.training.prompts import Picture, pictures, prompts_to_show
from simpletuner.training.resume import find, resume
from simpletuner.training.run_folder import locked, make_writable, save_config, without_paths
from simpletuner.training.signals import StopRequest, how_to_continue
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.training.summary import show_end, show_start
from simpletuner.training.trainer import Pace, Trainer
from simpletuner.training.validation import Renderer
from simpletuner.training.validator import Validator


def train(loaded: Loaded, console: Console, variables: Mapping[str, str]) -> int:
    """Run what the options say, from an image folder to a finished adapter.

    Args:
        loaded: the options, and what is to be said about them.
        variables: values for `{name}` in multidatabackend.json.

    Returns:
        The exit code, 0.

    Raises:
        SimpleTunerError: anything a user can cause, with a hint.
    """
    began = time.monotonic()
    for note in loaded.notes:
        console.say(f"note: {note}")
    with StopRequest(how_to_continue(loaded.config.training.resume_from_checkpoint)).listening() as stop, ExitStack() as held:
        with stop.settling():
            run = assemble(loaded.config, console, variables, stop, held)
            run.evaluator.before_training(run.trainer.state.step)
            run.validator.before_training(run.trainer.state.step)
        run.trainer.run()
        with stop.deferred():
            result = finish(run.trainer, run.family, run.denoiser, loaded.config)
        if run.trainer.accelerator.is_main_process:
            loads_by_name = run.family.source.loads_by_name  # else no two lines of diffusers load it as it was trained
            base = run.family.source_name()
            snippet = None if not loads_by_name else run.trainer.adapter.snippet(run.family.pipeline_class, base, run.arguments, str(result.folder))
            show_end(console, result.files, run.validator.grid, generate_line(loaded.config, result), snippet, duration(time.monotonic() - began))
    return 0


@dataclass(frozen=True, slots=True)
class Run:
    """A run with all its parts in place."""

    family: ModelFamily
    denoiser: nn.Module
    trainer: Trainer
    validator: Validator
    evaluator: Evaluator
    arguments: Mapping[str, object]
    """Of the plain pipeline's call, to render as validation does."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What there is before the denoiser is loaded."""

    family: ModelFamily
    adapter: Adapter
    accelerator: Accelerator
    shown: list[Picture]
    """What validation renders."""
    arguments: Mapping[str, object]
    caches: Caches
    sampler: Sampler


def prepare(config: TrainConfig, console: Console, variables: Mapping[str, str], held: ExitStack) -> Prepared:
    """Refuse what can be refused, then fill the caches.

    Args:
        held: gets what must be let go of when the run is over.
    """
    output_dir = Path(config.training.output_dir)
    family = build_family(config)
    family.check_source()
    adapter = build_adapter(config, family)
    find_optimizer(config.optim.optimizer)
    shown = pictures(config.validation, config.training.seed, family)
    accelerator = start_accelerator(config)
    make_writable(output_dir)
    if accelerator.is_main_process:
        held.enter_context(locked(output_dir))
    for note in (*family.notes(), *family.objective_notes(config.diffusion), *optimizer_notes(config.optim)):
        console.say(f"note: {note}")
    datasets = find_datasets(config, family, variables, console, accelerator)
    refuse_regularisation_of_full(adapter, datasets)

    sampler = datasets.sampler(config, accelerator, console)
    find(config.training.resume_from_checkpoint, CheckpointFolder(output_dir, None, lambda text: None))
    if config.adapters.init_lora and not config.adapters.init_lora.exists():
        raise ConfigError(f"init_lora {config.adapters.init_lora} does not exist", hint="Give a folder that a run saved, or a .safetensors file.")
    arguments = call_arguments(config, family)

    # Text encoders and VAE come and go, one after the other, before the denoiser comes to stay.
    caches = fill_caches(config, family, datasets, prompts_to_show(shown), console, accelerator)
    if caches.datasets is not datasets:  # images turned out to be damaged when they were read
        datasets = caches.datasets
        sampler = datasets.sampler(config, accelerator, console)
    held.callback(datasets.book.save)
    held.callback(caches.let_go)
    return Prepared(family, adapter, accelerator, shown, arguments, caches, sampler)


def assemble(config: TrainConfig, console: Console, variables: Mapping[str, str], stop: StopRequest, held: ExitStack) -> Run:
    """Prepare, then load the denoiser, and find where to go on from.

    Args:
        held: gets what must be let go of when the run is over.
    """
    ready = prepare(config, console, variables, held)
    family, adapter, accelerator, caches = ready.family, ready.adapter, ready.accelerator, ready.caches
    output_dir = Path(config.training.output_dir)
    loader = caches.loader(ready.sampler)
    denoiser, attached = attach_adapter(config, family, adapter, accelerator)
    training = config.training
    parameters = adapter.parameters()
    ema = Ema(parameters, training.ema_decay, training.ema_update_interval, training.ema_warmup_steps) if training.use_ema else None
    trackers = begin_trackers(config, output_dir, accelerator, console)
    renderer = Renderer(
        family, denoiser, adapter, caches.vae.get, caches.embeds.read, config.validation, config.diffusion, accelerator.device, lambda: stop.is_made
    )
    validator = Validator(renderer, caches.vae, ready.shown, output_dir, config, ema, trackers, accelerator, console)
    held_out = caches.datasets.held_out_samples()
    pace = pace_of(config, total_steps(training, ready.sampler), bool(ready.shown), bool(held_out))
    step = build_step(config, family, denoiser, adapter, accelerator)
    autocast = partial(autocast_of, config, adapter, accelerator.device)
    evaluator = Evaluator(
        step=step,
        loader=loader,
        held_out=held_out,
        options=config.validation,
        is_stopped=lambda: stop.is_made,
        batch_size=training.train_batch_size,
        output_dir=output_dir,
        ema=ema,
        trackers=trackers,
        accelerator=accelerator,
        console=console,
        autocast=autocast,
    )
    trainer = Trainer(
        step=step,
        adapter=adapter,
        optimizer=build_optimizer(config.optim, parameters),
        schedule=build_schedule(config.optim, pace.total_steps),
        optim=config.optim,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=config.memory.mixed_precision == "fp16"),
        ema=ema,
        loader=loader,
        pace=pace,
        state=TrainState(step=0, position=0, epoch=0, data_digest=loader.digest()),
        accelerator=accelerator,
        checkpoints=CheckpointFolder(output_dir, training.checkpoints_total_limit, console.warn),
        metadata=metadata_of(config, family, triggers_of(caches.datasets.plan)),
        write_extras=lambda folder: save_config(folder, config.flat()),
        validator=validator,
        evaluator=evaluator,
        trackers=trackers,
        console=console,
        stop=stop,
        autocast=autocast,
    )
    at_end = "; that is the last step: raise max_train_steps to go on"

    start = resume(trainer, training.resume_from_checkpoint, console, [validator.move_later, evaluator.move_later])
    if accelerator.is_main_process:
        caches.datasets.take_up()
    facts = caches.datasets.facts(training.train_batch_size, caches.versions)
    show_start(
        console,
        config,
        family.source_name(),
        attached,
        facts,
        pace,
        loader.batches_per_epoch(),
        start + (at_end if trainer.state.step == pace.total_steps else ""),
        evaluator.describe(config.validation.eval_steps_interval),
    )
    return Run(family, denoiser, trainer, validator, evaluator, ready.arguments)


def begin_trackers(config: TrainConfig, output_dir: Path, accelerator: Accelerator, console: Console) -> Trackers:
    """Start the trackers, on the first process alone."""
    options = config.reporting
    asked = options.report_to if accelerator.is_main_process else "none"
    folder = output_dir / options.logging_dir
    return start_trackers(asked, folder, options.tracker_project_name, options.tracker_run_name, without_paths(config.flat()), console.warn)


def build_step(config: TrainConfig, family: ModelFamily, denoiser: nn.Module, adapter: Adapter, accelerator: Accelerator) -> Step:
    process = family.process(config.diffusion)
    return Step(
        family=family,
        denoiser=denoiser,
        adapter=adapter,
        process=process,
        loss=loss_of(config.diffusion, process),
        device=accelerator.device,
        seed=config.training.seed,
        rank=accelerator.process_index,
        draws_latents=config.data.vae_latent_sampling == "fresh",
        scheduled_sampling=scheduled_sampling_of(config.diffusion, family.objective),
    )


def autocast_of(config: TrainConfig, adapter: Adapter, device: torch.device) -> AbstractContextManager[None]:
    """Float32 weights that are themselves trained are computed with in 16 bits under autocast; a frozen base is held in them."""
    dtype = weight_dtype(config.memory)
    return torch.autocast(device.type, dtype) if adapter.trains_base and dtype != torch.float32 else nullcontext()


def refuse_regularisation_of_full(adapter: Adapter, datasets: Datasets) -> None:
    """Regularisation pictures are trained towards what the untouched model answers, and `full` leaves none untouched."""
    wrong = [dataset.id for dataset in datasets.plan.datasets if dataset.is_regularisation]
    if adapter.trains_base and wrong:
        raise ConfigError(
            f"is_regularisation_data in {', '.join(wrong)} needs an adapter: with model_type full no untouched model is left to ask",
            hint="Set model_type to lora, or drop the key.",
        )


def attach_adapter(config: TrainConfig, family: ModelFamily, adapter: Adapter, accelerator: Accelerator) -> tuple[nn.Module, Attached]:
    """Load the denoiser in its final precision, move it, and put the adapter on what it will really be trained against."""
    denoiser = load_denoiser(config, family, adapter).to(accelerator.device)
    torch.manual_seed(seed_from("adapter", config.training.seed))
    attached = adapter.attach(denoiser)
    if config.adapters.init_lora:
        adapter.load(Path(config.adapters.init_lora))
    if config.memory.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    denoiser.train()
    return denoiser, attached


def build_family(config: TrainConfig) -> ModelFamily:
    kind = plugins.load("simpletuner.models.families", config.models.model_family, ModelFamily)  # type: ignore[type-abstract]
    return kind(config.models)


def build_adapter(config: TrainConfig, family: ModelFamily) -> Adapter:
    kind = plugins.load("simpletuner.adapters.kinds", kind_of(config.adapters), Adapter)  # type: ignore[type-abstract]
    names = (family.denoiser_folder, family.original_layout, family.lora_target_sets)
    return kind(config.adapters, Targets(family.class_aliases, family.lora_targets, *names))


def load_denoiser(config: TrainConfig, family: ModelFamily, adapter: Adapter) -> nn.Module:
    """Load the base on the CPU in the precision in which it will be used."""
    if adapter.trains_base:
        return family.load_denoiser(torch.float32, seed_from("model", config.training.seed))
    return load_frozen(config, family)


def load_frozen(config: TrainConfig, family: ModelFamily) -> nn.Module:
    """Load the base on the CPU in the precision in which it is used where it is not trained itself."""
    denoiser = family.load_denoiser(weight_dtype(config.memory), seed_from("model", config.training.seed))
    quantise(denoiser, config.memory.base_model_precision)
    return denoiser


def pace_of(config: TrainConfig, steps: int, has_pictures: bool, evaluates: bool) -> Pace:
    """Settle when what is due."""
    training = config.training
    return Pace(
        total_steps=steps,
        accumulation=training.gradient_accumulation_steps,
        save_every=training.checkpoint_step_interval,
        validate_every=config.validation.validation_step_interval if has_pictures else 0,
        evaluate_every=config.validation.eval_steps_interval if evaluates else None,
    )
