"""Put a run together, in the order that memory allows, and run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from simpletuner.adapters.adapter import Adapter, Attached
from simpletuner.console import Console, duration
from simpletuner.data.loader import Loader
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import Offload, is_asked_for
from simpletuner.memory.residency import weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.optim.averaging import averaged
from simpletuner.optim.build import build_optimizer, build_schedule
from simpletuner.optim.scaling import scaled
from simpletuner.options.load import Loaded
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.reporting.events import Events
from simpletuner.reporting.tracker import Trackers
from simpletuner.training.assistant import Assistant
from simpletuner.training.base import load_denoiser, risks, trained_dtype
from simpletuner.training.card_facts import CardSource
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.compiling import compile_blocks
from simpletuner.training.datasets import total_steps
from simpletuner.training.ema import Ema, build_ema
from simpletuner.training.evaluations import Progress
from simpletuner.training.evaluator import Evaluator
from simpletuner.training.finish import finish, metadata_of, show_result, triggers_of
from simpletuner.training.layouts import refuse_layout, write_beside
from simpletuner.training.live_text import LiveText
from simpletuner.training.objective import loss_of, scheduled_sampling_of
from simpletuner.training.pace import pace_of
from simpletuner.training.plan_check import planned, probes
from simpletuner.training.preparing import Prepared, prepare
from simpletuner.training.previews import Previews
from simpletuner.training.products import ProductChoice
from simpletuner.training.publishing import Publisher
from simpletuner.training.recovery import Recovery, advice_of, conditions_of, no_more_room
from simpletuner.training.release import Release
from simpletuner.training.report_facts import begin_report
from simpletuner.training.resume import resume
from simpletuner.training.run_folder import save_config
from simpletuner.training.signals import StopRequest, how_to_continue
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.training.summary import show_start
from simpletuner.training.telling import begin_trackers, telling, when_saved
from simpletuner.training.trainer import Trainer
from simpletuner.training.validation import Renderer
from simpletuner.training.validator import Validator
from simpletuner.types import Sample


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
    request = StopRequest(how_to_continue(loaded.config.training.resume_from_checkpoint))
    with request.listening() as stop, telling(loaded.config, console, stop, loaded.origins) as events, ExitStack() as held:
        with stop.settling():
            run = assemble(loaded.config, console, variables, stop, held, events)
            with averaged(run.trainer.optimizer):
                run.evaluator.before_training(run.trainer.state.step)
                run.validator.before_training(run.trainer.state.step)
        run.trainer.run()
        events.stage("model_save")
        with stop.deferred(), averaged(run.trainer.optimizer):
            result = finish(run.trainer, run.family, run.denoiser, loaded.config)
        if run.trainer.accelerator.is_main_process:
            seconds = duration(time.monotonic() - began)
            show_result(console, run.trainer, run.family, loaded.config, result, run.arguments, run.validator.grid, seconds)
            with stop.deferred():
                run.publisher.finished(result, run.trainer.state.step)
        events.stage("training_complete")
    return 0


@dataclass(frozen=True, slots=True)
class Run:
    """A run with all its parts in place."""

    family: ModelFamily
    denoiser: nn.Module
    trainer: Trainer
    validator: Validator
    evaluator: Evaluator
    publisher: Publisher
    arguments: Mapping[str, object]
    """Of the plain pipeline's call, to render as validation does."""


def assemble(
    config: TrainConfig, console: Console, variables: Mapping[str, str], stop: StopRequest, held: ExitStack, events: Events | None = None
) -> Run:
    """Prepare, then load the denoiser, and find where to go on from.

    Args:
        held: gets what must be let go of when the run is over.
        events: told of every stage.
    """
    events = events or Events()
    ready = prepare(config, console, variables, stop, held, events)
    family, adapter, accelerator, caches = ready.family, ready.adapter, ready.accelerator, ready.caches
    output_dir = Path(config.training.output_dir)
    loader = caches.loader(ready.sampler)
    events.stage("init_load_base_model")
    denoiser, attached, offload = attach_adapter(config, family, adapter, accelerator, ready.assistant)
    ready.attention.attach(denoiser)
    if accelerator.is_main_process:
        refuse_layout(adapter, config, family)
    training = config.training
    parameters = adapter.parameters()
    ema = build_ema(training, parameters) if training.use_ema else None
    steps = total_steps(training, ready.sampler)
    trackers = held.enter_context(closing(begin_trackers(config, output_dir, console, events, steps)))
    progress = Progress(output_dir, config.validation, accelerator, console.warn)
    renderer = build_renderer(config, ready, denoiser, stop, console, events)
    validator = Validator(renderer, caches.vae, ready.shown, output_dir, config, ema, trackers, accelerator, console)
    held_out = caches.datasets.held_out_samples()
    pace = pace_of(config, steps, ready.sampler.batches_per_epoch(), bool(ready.shown), bool(held_out))
    step = build_step(config, family, denoiser, adapter, accelerator, ready.text)
    autocast = partial(autocast_of, config, adapter, accelerator.device)
    recovery = build_recovery(config, adapter, accelerator, console, offload)
    evaluator = build_evaluator(config, step, loader, held_out, recovery, ema, trackers, accelerator, console, stop, autocast)
    events.stage("init_prepare_models")
    optim, products = scaled(config.optim, training.images_per_step), ProductChoice(config)
    optimizer = build_optimizer(optim, parameters, adapter.text_parameters())
    publisher = held.enter_context(closing(build_publisher(config, ready, attached, pace.total_steps, console, stop)))
    trainer = Trainer(
        step=step,
        adapter=adapter,
        optimizer=optimizer,
        schedule=build_schedule(optim, pace.total_steps),
        optim=optim,
        release=Release(optimizer, optim) if adapter.trains_base and optim.optimizer_release_gradients else None,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=config.memory.mixed_precision == "fp16"),
        ema=ema,
        recovery=recovery,
        loader=loader,
        pace=pace,
        state=TrainState(step=0, position=0, epoch=0, data_digest=loader.digest(), assistant=ready.assistant.identity),
        accelerator=accelerator,
        checkpoints=CheckpointFolder(output_dir, training.checkpoints_total_limit, console.warn, progress.best_of),
        metadata=metadata_of(config, family, triggers_of(caches.datasets.plan)),
        write_extras=partial(write_extras, config, family, products),
        validator=validator,
        evaluator=evaluator,
        probes=probes(ready.plan, accelerator.device, console.say),
        trackers=trackers,
        console=console,
        stop=stop,
        autocast=autocast,
        on_saved=when_saved(events, progress, publisher.saved),
        progress=progress,
    )
    run = Run(family, denoiser, trainer, validator, evaluator, publisher, ready.arguments)
    begin(config, console, ready, run, attached, products)
    return run


def build_evaluator(
    config: TrainConfig,
    step: Step,
    loader: Loader,
    held_out: Mapping[str, Sequence[Sample]],
    recovery: Recovery,
    ema: Ema | None,
    trackers: Trackers,
    accelerator: Accelerator,
    console: Console,
    stop: StopRequest,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Evaluator:
    return Evaluator(
        step=step,
        loader=loader,
        held_out=held_out,
        options=config.validation,
        is_stopped=lambda: stop.is_made,
        batch_size=config.training.train_batch_size,
        recovery=recovery,
        output_dir=Path(config.training.output_dir),
        ema=ema,
        trackers=trackers,
        accelerator=accelerator,
        console=console,
        autocast=autocast,
    )


def begin(config: TrainConfig, console: Console, ready: Prepared, run: Run, attached: Attached, products: ProductChoice) -> None:
    """Find where to go on from, and say what the run is."""
    trainer, datasets, at_end = run.trainer, ready.caches.datasets, "; that is the last step: raise max_train_steps to go on"
    trainer.trackers.events.stage("init_resume_checkpoint")
    movers = [run.validator.move_later, run.evaluator.move_later, trainer.trackers.events.move_later]
    start = resume(trainer, config.training.resume_from_checkpoint, console, movers, [run.evaluator.drop_later])
    if trainer.accelerator.is_main_process:
        datasets.take_up()
    show_start(
        console,
        config,
        run.family.source_name(),
        attached,
        datasets.facts(config.training.train_batch_size, ready.caches.versions),
        trainer.pace,
        trainer.loader.batches_per_epoch(),
        start + (at_end if trainer.state.step == trainer.pace.total_steps else ""),
        run.evaluator.describe(trainer.pace.evaluate),
        planned(ready.plan) if ready.plan else "",
        products.settle(run.denoiser, trainer, ready.sampler, console),
    )
    begin_report(config, run.family.source_name(), attached, datasets, ready.plan, trainer, start)
    compile_blocks(config, run.denoiser, trainer, console)


def write_extras(config: TrainConfig, family: ModelFamily, products: ProductChoice, folder: Path) -> None:
    """Add to a checkpoint what a run does not need to go on from it, but for how its layers multiply."""
    products.save(folder)
    write_beside(folder, config, family)
    save_config(folder, config.flat())


def build_publisher(config: TrainConfig, ready: Prepared, attached: Attached, steps: int, console: Console, stop: StopRequest) -> Publisher:
    source = CardSource(config, ready.family, ready.adapter, attached, ready.caches.datasets, ready.shown, ready.arguments, steps)
    return Publisher(source, ready.repository, console, stop)


def build_renderer(config: TrainConfig, ready: Prepared, denoiser: nn.Module, stop: StopRequest, console: Console, events: Events) -> Renderer:
    folder, device = Path(config.training.output_dir), ready.accelerator.device
    return Renderer(
        previews=Previews(ready.family, config.validation, folder, device, console, events.preview) if config.validation.validation_preview else None,
        family=ready.family,
        denoiser=denoiser,
        adapter=ready.adapter,
        load_vae=ready.caches.vae.get,
        text=ready.text.read if ready.text else ready.caches.embeds.read,
        options=config.validation,
        diffusion=config.diffusion,
        device=ready.accelerator.device,
        assistant=ready.assistant,
        attention=ready.attention,
        is_stopped=lambda: stop.is_made,
    )


def build_recovery(config: TrainConfig, adapter: Adapter, accelerator: Accelerator, console: Console, offload: Offload) -> Recovery:
    conditions = conditions_of(config.memory, config.training.train_batch_size, accelerator.device)
    more_room = offload.more_room if accelerator.device.type == "cuda" else no_more_room
    return Recovery(conditions, console.warn, advice_of(config.memory, is_full=adapter.trains_base), more_room)


def build_step(
    config: TrainConfig, family: ModelFamily, denoiser: nn.Module, adapter: Adapter, accelerator: Accelerator, text: LiveText | None
) -> Step:
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
        encode=text.encode if text else None,
    )


def autocast_of(config: TrainConfig, adapter: Adapter, device: torch.device) -> AbstractContextManager[None]:
    """Float32 weights that are themselves trained are computed with in 16 bits under autocast; others are held in what they compute in."""
    dtype = weight_dtype(config.memory)
    return torch.autocast(device.type, dtype) if adapter.trains_base and dtype != trained_dtype(config) else nullcontext()


def attach_adapter(
    config: TrainConfig, family: ModelFamily, adapter: Adapter, accelerator: Accelerator, assistant: Assistant
) -> tuple[nn.Module, Attached, Offload]:
    """Load the denoiser in its final precision, put the adapter on what it will really be trained against, and move what is to be moved."""
    said: list[str] = []
    denoiser, device = load_denoiser(config, family, adapter, accelerator, said.append), accelerator.device
    if not is_asked_for(config.memory):
        denoiser.to(device)
    assistant.attach(denoiser, device)
    torch.manual_seed(seed_from("adapter", config.training.seed))
    attached = adapter.attach(denoiser)
    if config.adapters.init_lora:
        adapter.load(Path(config.adapters.init_lora))
    offload = Offload(denoiser, config.memory, device)
    adapter.to(device)
    enable_checkpointing(denoiser, config.memory)
    denoiser.train()
    return denoiser, replace(attached, notes=(*attached.notes, *risks(family, attached.layers), *offload.said(), *said)), offload
