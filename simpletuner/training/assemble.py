"""Put a run together, in the order that memory allows, and run it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from simpletuner import plugins
from simpletuner.adapters.adapter import Adapter, Targets, kind_of
from simpletuner.console import Console
from simpletuner.data.embeds import EmbedCache
from simpletuner.data.latents import LatentCache
from simpletuner.data.loader import Loader
from simpletuner.data.store import Store
from simpletuner.diffusion.loss import loss_function
from simpletuner.errors import ConfigError
from simpletuner.memory.precision import quantise
from simpletuner.memory.residency import weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.optim.build import build_optimizer, build_schedule
from simpletuner.options.load import Loaded
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.reporting.tracker import start_trackers
from simpletuner.training.caching import TextEncoders, Vae, fill_latents, fill_text
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.datasets import Datasets, find_datasets
from simpletuner.training.ema import Ema
from simpletuner.training.finish import finish, metadata_of
from simpletuner.training.machine import start_accelerator
from simpletuner.training.prompts import pictures
from simpletuner.training.resume import resume
from simpletuner.training.run_folder import make_writable, save_config
from simpletuner.training.signals import StopRequest
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.training.summary import show_start
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
    with StopRequest().listening() as stop:
        run = assemble(loaded.config, console, variables, stop)
        run.validator.before_training(run.trainer.state.step)
        run.trainer.run()
        finish(run.trainer, run.family, run.denoiser, run.validator, loaded.config, console, time.monotonic() - began)
    return 0


@dataclass(frozen=True, slots=True)
class Run:
    """A run with all its parts in place."""

    family: ModelFamily
    denoiser: nn.Module
    trainer: Trainer
    validator: Validator


def assemble(config: TrainConfig, console: Console, variables: Mapping[str, str], stop: StopRequest) -> Run:
    """Refuse what can be refused, then fill the caches, load the denoiser, and find where to go on from."""
    output_dir = Path(config.training.output_dir)
    family = build_family(config)
    family.check_source()
    adapter = build_adapter(config, family)
    shown = pictures(config.validation, config.training.seed, family.alignment_px)
    accelerator = start_accelerator(config)
    make_writable(output_dir)
    datasets = find_datasets(config, family, variables, accelerator.num_processes, console)
    if adapter.trains_base and any(dataset.plan.is_regularisation for dataset in datasets.all):
        raise ConfigError("is_regularisation_data needs an adapter: with model_type full there is no untouched model to ask", hint="Set model_type to lora, or drop the key.")

    # Text encoders first: nothing else is loaded yet, and they are gone before the next large thing comes.
    encoders = TextEncoders(family, config.memory, accelerator.device)
    embeds = EmbedCache(Store(datasets.text_cache_dir), encoders.encode, encoders.fingerprint(), config.data.text_encoder_batch_size)
    prompts = [*datasets.prompts(config.data.caption_dropout_probability), *(text for picture in shown for text in (picture.prompt, picture.negative_prompt))]
    fill_text(embeds, encoders, family, prompts, console, accelerator)

    # The VAE second, with the text encoders gone.
    vae = Vae(family, config.memory, accelerator.device)
    latents = datasets.latent_cache(vae.encode, family.vae_fingerprint(), config.data)
    if not (config.data.vae_cache_ondemand or config.data.vae_cache_disable):
        fill_latents(latents, vae, datasets.samples(), console, accelerator)
    loader = datasets.loader(latents, embeds, config, accelerator)

    # The denoiser last, in its final precision before it moves, and the adapter on what it will really be trained against.
    denoiser = load_denoiser(config, family, adapter).to(accelerator.device)
    torch.manual_seed(seed_from("adapter", config.training.seed))
    attached = adapter.attach(denoiser)
    if config.adapters.init_lora:
        adapter.load(Path(config.adapters.init_lora))
    if config.memory.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    denoiser.train()

    pace = pace_of(config, loader)
    checkpoints = CheckpointFolder(output_dir, config.training.checkpoints_total_limit, console.warn)
    parameters = adapter.parameters()
    training = config.training
    ema = Ema(parameters, training.ema_decay, training.ema_update_interval, training.ema_warmup_steps) if training.use_ema else None
    renderer = Renderer(family, denoiser, adapter, vae.get, embeds.read, config.validation, accelerator.device)
    logging_dir = output_dir / config.reporting.logging_dir
    reporting = config.reporting
    trackers = start_trackers(
        reporting.report_to if accelerator.is_main_process else "none", logging_dir, reporting.tracker_project_name, reporting.tracker_run_name, config.flat(), console.warn
    )
    validator = Validator(renderer, vae, shown, output_dir, config, ema, trackers, accelerator, console)
    trainer = Trainer(
        step=Step(
            family=family,
            denoiser=denoiser,
            adapter=adapter,
            process=family.process(config.diffusion),
            loss=loss_function(config.diffusion.loss_type, config.diffusion.huber_c),
            device=accelerator.device,
            seed=training.seed,
            rank=accelerator.process_index,
            draws_latents=config.data.vae_latent_sampling == "fresh",
        ),
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
        checkpoints=checkpoints,
        metadata=metadata_of(config, family),
        write_extras=lambda folder: save_config(folder, config.flat()),
        validate=validator.validate,
        trackers=trackers,
        console=console,
        stop=stop,
    )
    start = resume(trainer, training.resume_from_checkpoint, checkpoints, console)
    show_start(console, config, family.source_name(), attached, datasets.facts(), pace, loader.batches_per_epoch() / pace.accumulation, str(accelerator.device), start)
    return Run(family, denoiser, trainer, validator)


def build_family(config: TrainConfig) -> ModelFamily:
    kind = plugins.load("simpletuner.models.families", config.models.model_family, ModelFamily)  # type: ignore[type-abstract]
    return kind(config.models)


def build_adapter(config: TrainConfig, family: ModelFamily) -> Adapter:
    kind = plugins.load("simpletuner.adapters.kinds", kind_of(config.adapters), Adapter)  # type: ignore[type-abstract]
    return kind(config.adapters, Targets(family.class_aliases, family.lora_targets, family.denoiser_folder))


def load_denoiser(config: TrainConfig, family: ModelFamily, adapter: Adapter) -> nn.Module:
    """Load the base on the CPU in the precision in which it will be used."""
    precision = config.memory.base_model_precision
    if adapter.trains_base:
        if precision != "no_change":
            raise ConfigError(f"base_model_precision {precision} needs an adapter: quantised weights cannot be trained", hint="Set it to no_change, or model_type to lora.")
        return family.load_denoiser(torch.float32, seed_from("model", config.training.seed))
    denoiser = family.load_denoiser(weight_dtype(config.memory), seed_from("model", config.training.seed))
    quantise(denoiser, precision)
    return denoiser


def pace_of(config: TrainConfig, loader: Loader) -> Pace:
    """Work out how many steps there are."""
    training = config.training
    accumulation = training.gradient_accumulation_steps
    total = training.max_train_steps
    if not total:
        epochs = training.num_train_epochs or 1
        batches = sum(loader.batches_per_epoch(epoch) for epoch in range(epochs))
        total = math.ceil(batches / (accumulation * training.num_processes))
    has_pictures = bool(config.validation.validation_prompt or config.validation.user_prompt_library) and not config.validation.validation_disable
    return Pace(
        total_steps=total,
        accumulation=accumulation,
        save_every=training.checkpoint_step_interval,
        validate_every=config.validation.validation_step_interval if has_pictures else 0,
    )
