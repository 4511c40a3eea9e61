"""Put a run together, in the order that memory allows, and run it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from simpletuner.adapters.adapter import Adapter, Attached
from simpletuner.console import Console, duration
from simpletuner.data.sampler import Sampler
from simpletuner.errors import ConfigError
from simpletuner.memory.checkpointing import enable_checkpointing
from simpletuner.memory.offload import Offload, check_offload, is_asked_for
from simpletuner.memory.residency import weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.optim.averaging import averaged
from simpletuner.optim.build import build_optimizer, build_schedule
from simpletuner.optim.catalogue import find as find_optimizer
from simpletuner.optim.notes import notes as optimizer_notes
from simpletuner.optim.rules import check_release
from simpletuner.optim.scaling import scaled, scaling_notes
from simpletuner.options.load import Loaded
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.reporting.tracker import Trackers, start_trackers
from simpletuner.training.assistant import Assistant, find_assistant
from simpletuner.training.assistant_rules import assistant_notes
from simpletuner.training.attention import Attention, attention_of
from simpletuner.training.base import check_goes_on, check_precisions, load_denoiser, risks, trained_dtype
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.caching import Caches, fill_caches
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.compiling import compile_blocks
from simpletuner.training.datasets import Datasets, find_datasets, total_steps
from simpletuner.training.ema import build_ema
from simpletuner.training.evaluator import Evaluator
from simpletuner.training.finish import call_arguments, finish, generate_line, metadata_of, triggers_of
from simpletuner.training.layouts import OWN, refuse_layout, write_beside
from simpletuner.training.live_text import LiveText, live_text
from simpletuner.training.machine import start_accelerator
from simpletuner.training.objective import loss_of, scheduled_sampling_of
from simpletuner.training.plan import Plan
from simpletuner.training.plan_check import plan_start, planned, probes
from simpletuner.training.prompts import Picture, pictures, prompts_to_show
from simpletuner.training.recovery import Recovery, advice_of, conditions_of, no_more_room
from simpletuner.training.release import Release
from simpletuner.training.resume import find, resume
from simpletuner.training.run_folder import locked, make_writable, save_config, without_paths
from simpletuner.training.signals import StopRequest, how_to_continue
from simpletuner.training.starts import check_starts, with_starts
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.training.summary import show_end, show_start
from simpletuner.training.text_rules import check_text_training
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
            with averaged(run.trainer.optimizer):
                run.evaluator.before_training(run.trainer.state.step)
                run.validator.before_training(run.trainer.state.step)
        run.trainer.run()
        with stop.deferred(), averaged(run.trainer.optimizer):
            result = finish(run.trainer, run.family, run.denoiser, loaded.config)
        if run.trainer.accelerator.is_main_process:
            # Else no two lines of diffusers load it as it was trained.
            loads_by_name = run.family.source.loads_by_name and loaded.config.adapters.lora_format == OWN
            base = run.family.source_name()
            snippet = None if not loads_by_name else run.trainer.adapter.snippet(run.family.pipeline_class, base, run.arguments, str(result.folder))
            command = generate_line(loaded.config, result, run.arguments)
            show_end(console, result.files, run.validator.grid, command, snippet, duration(time.monotonic() - began))
            if (layout := loaded.config.adapters.lora_format) != OWN and loaded.config.adapters.model_type == "lora":
                console.say(f"note: the adapter is in the layout {layout}; `simpletuner export --format diffusers` or lycoris writes it for Python")
            recovered = run.trainer.recovery.describe()
            if recovered:
                console.say(f"note: {recovered}")
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


def prepare(config: TrainConfig, console: Console, variables: Mapping[str, str], stop: StopRequest, held: ExitStack) -> Prepared:
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
    caches = fill_caches(config, family, datasets, prompts_to_show(shown), console, accelerator)
    if caches.datasets is not datasets:  # images turned out to be damaged when they were read
        datasets = caches.datasets
        sampler = datasets.sampler(config, accelerator, console)
    held.callback(datasets.book.save)
    held.callback(caches.let_go)
    text = live_text(config, family, adapter, caches.trained_encoders, caches.embeds.read)
    return Prepared(family, adapter, assistant, attention, accelerator, shown, arguments, caches, text, sampler, plan)


def assemble(config: TrainConfig, console: Console, variables: Mapping[str, str], stop: StopRequest, held: ExitStack) -> Run:
    """Prepare, then load the denoiser, and find where to go on from.

    Args:
        held: gets what must be let go of when the run is over.
    """
    ready = prepare(config, console, variables, stop, held)
    family, adapter, accelerator, caches = ready.family, ready.adapter, ready.accelerator, ready.caches
    output_dir = Path(config.training.output_dir)
    loader = caches.loader(ready.sampler)
    denoiser, attached, offload = attach_adapter(config, family, adapter, accelerator, ready.assistant)
    ready.attention.attach(denoiser)
    if accelerator.is_main_process:
        refuse_layout(adapter, config, family)
    training = config.training
    parameters = adapter.parameters()
    ema = build_ema(training, parameters) if training.use_ema else None
    trackers = begin_trackers(config, output_dir, accelerator, console)
    renderer = build_renderer(config, ready, denoiser, stop)
    validator = Validator(renderer, caches.vae, ready.shown, output_dir, config, ema, trackers, accelerator, console)
    held_out = caches.datasets.held_out_samples()
    pace = pace_of(config, total_steps(training, ready.sampler), bool(ready.shown), bool(held_out))
    step = build_step(config, family, denoiser, adapter, accelerator, ready.text)
    autocast = partial(autocast_of, config, adapter, accelerator.device)
    recovery = build_recovery(config, adapter, accelerator, console, offload)
    evaluator = Evaluator(
        step=step,
        loader=loader,
        held_out=held_out,
        options=config.validation,
        is_stopped=lambda: stop.is_made,
        batch_size=training.train_batch_size,
        recovery=recovery,
        output_dir=output_dir,
        ema=ema,
        trackers=trackers,
        accelerator=accelerator,
        console=console,
        autocast=autocast,
    )
    optim = scaled(config.optim, training.images_per_step)
    optimizer = build_optimizer(optim, parameters, adapter.text_parameters())
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
        checkpoints=CheckpointFolder(output_dir, training.checkpoints_total_limit, console.warn),
        metadata=metadata_of(config, family, triggers_of(caches.datasets.plan)),
        write_extras=partial(write_extras, config, family),
        validator=validator,
        evaluator=evaluator,
        probes=probes(ready.plan, accelerator.device, console.say),
        trackers=trackers,
        console=console,
        stop=stop,
        autocast=autocast,
    )
    run = Run(family, denoiser, trainer, validator, evaluator, ready.arguments)
    begin(config, console, ready, run, attached)
    return run


def begin(config: TrainConfig, console: Console, ready: Prepared, run: Run, attached: Attached) -> None:
    """Find where to go on from, and say what the run is."""
    trainer, datasets, at_end = run.trainer, ready.caches.datasets, "; that is the last step: raise max_train_steps to go on"
    start = resume(trainer, config.training.resume_from_checkpoint, console, [run.validator.move_later, run.evaluator.move_later])
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
        run.evaluator.describe(config.validation.eval_steps_interval),
        planned(ready.plan) if ready.plan else "",
    )
    compile_blocks(config, run.denoiser, trainer, console)


def write_extras(config: TrainConfig, family: ModelFamily, folder: Path) -> None:
    """Add to a checkpoint what a run does not need to go on from it."""
    write_beside(folder, config, family)
    save_config(folder, config.flat())


def begin_trackers(config: TrainConfig, output_dir: Path, accelerator: Accelerator, console: Console) -> Trackers:
    """Start the trackers, on the first process alone."""
    options = config.reporting
    asked = options.report_to if accelerator.is_main_process else "none"
    folder = output_dir / options.logging_dir
    return start_trackers(asked, folder, options.tracker_project_name, options.tracker_run_name, without_paths(config.flat()), console.warn)


def build_renderer(config: TrainConfig, ready: Prepared, denoiser: nn.Module, stop: StopRequest) -> Renderer:
    return Renderer(
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


def refuse_regularisation_of_full(adapter: Adapter, datasets: Datasets) -> None:
    """Regularisation pictures are trained towards what the untouched model answers, and `full` leaves none untouched."""
    wrong = [dataset.id for dataset in datasets.plan.datasets if dataset.is_regularisation]
    if adapter.trains_base and wrong:
        raise ConfigError(
            f"is_regularisation_data in {', '.join(wrong)} needs an adapter: with model_type full no untouched model is left to ask",
            hint="Set model_type to lora, or drop the key.",
        )


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
