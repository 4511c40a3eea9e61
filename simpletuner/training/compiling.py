"""Compile the blocks of the denoiser before the first step, on the first batch of the run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from simpletuner.console import Console, duration
from simpletuner.data.row_encoder import is_out_of_memory
from simpletuner.errors import ConfigError, Stopped
from simpletuner.memory.compiling import CompiledForward, Compiler, missing_for
from simpletuner.memory.residency import release
from simpletuner.options.train_config import TrainConfig
from simpletuner.randomness import seed_from
from simpletuner.training.parts import drawn_as_whole, parts_of
from simpletuner.training.recovery import attempt, bucket_of
from simpletuner.training.signals import StopRequest
from simpletuner.training.step import seed_dropouts
from simpletuner.training.trainer import Trainer
from simpletuner.types import Batch

FOLDER = "compiled"
"""In `cache_dir`."""
PLACE = "TORCHINDUCTOR_CACHE_DIR"
"""Where PyTorch looks for what it compiled before; it knows no other way to be told."""

COMPILED_OPTIMIZERS = "ao-"
"""How the names of optimizers begin that compile themselves in their first step."""


def compile_blocks(config: TrainConfig, denoiser: nn.Module, trainer: Trainer, console: Console) -> None:
    """Do as `dynamo_backend` says; where nothing can be compiled, say so and leave the denoiser as it is. Say if the optimizer is to be compiled.

    Args:
        trainer: as it starts or goes on; its weights, state and gradients stay as they are.

    Raises:
        ConfigError: the optimizer needs a compiler that is missing, or `activation_memory_budget` meets a dropout.
        Stopped: a signal came.
    """
    options, device = config.compiling, trainer.step.device
    compiles_optimizer = config.optim.optimizer.startswith(COMPILED_OPTIMIZERS)
    if trainer.state.step >= trainer.pace.total_steps or (options.dynamo_backend == "no" and not compiles_optimizer):
        return
    missing = missing_for(device)
    if missing and compiles_optimizer:
        raise ConfigError(f"optimizer {config.optim.optimizer} is compiled, but {missing}", hint="Install it, or take adamw_bf16.")
    _keep_in(Path(config.data.cache_dir))
    if compiles_optimizer:
        console.say(f"the first step compiles the optimizer {config.optim.optimizer}: about a minute, once")
    if options.dynamo_backend == "no":
        return
    if missing:
        console.warn(f"dynamo_backend {options.dynamo_backend} has no effect: {missing}")
        return
    if options.has_budget and _draws(trainer):
        said = f"activation_memory_budget {options.activation_memory_budget:g} cannot be with dropouts: what is computed again would draw anew"
        raise ConfigError(said, hint="Take dropout, rank_dropout and module_dropout out of lycoris_config, or leave the budget out.")
    if options.records_graphs and device.type != "cuda":
        console.warn(f"dynamo_mode {options.dynamo_mode} has no effect on a {device.type} device: there are no CUDA graphs")
    compiler = Compiler(
        options.dynamo_backend,
        console.warn,
        mode=options.dynamo_mode,
        is_dynamic=options.dynamo_dynamic,
        memory_budget=options.activation_memory_budget,
        raise_other_cause=partial(_raise_other_cause, trainer.stop),
    )
    blocks = compiler.attach(denoiser)
    if not blocks:
        console.warn(f"dynamo_backend {options.dynamo_backend} has no effect: {type(denoiser).__name__} has no repeated blocks")
        return
    console.say(f"compiling the blocks of {type(denoiser).__name__}; this takes minutes the first time")
    began = time.monotonic()
    if not _try_out(trainer, compiler, blocks):
        release()
        console.warn("memory ran out while blocks were compiled: whether their way back can be compiled was not tried, and the first step does it")
        return
    ready = sum(forward.kind not in compiler.failed for forward in blocks)
    console.say(f"compiled {ready} of {len(blocks)} blocks in {duration(time.monotonic() - began)}")


def _keep_in(cache_dir: Path) -> None:
    """Have PyTorch keep what it compiles with the other caches, unless it was told where."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(PLACE) in (None, default_cache_dir()):  # PyTorch itself writes its default there when it is first asked for it
        os.environ[PLACE] = str((cache_dir / FOLDER).absolute())


def _draws(trainer: Trainer) -> bool:
    """Whether the denoiser or its adapter draws anything while it computes, as dropouts do."""
    step = trainer.step

    def state() -> torch.Tensor:
        return torch.get_device_module(step.device).get_rng_state() if step.device.type != "cpu" else torch.get_rng_state()

    with torch.no_grad(), trainer.autocast():
        step.losses(_first_batch(trainer), 0, 0, slice(0, 1))
    after = state()
    seed_dropouts(step.device, seed_from("dropout", step.seed, 0, step.rank, 0))
    return not torch.equal(after, state())


def _first_batch(trainer: Trainer) -> Batch:
    """Of this process, in the run."""
    ready = trainer.step.make_ready(trainer.loader.batch_at(trainer.accelerator.process_index), 0, 0)
    return trainer.delivery.bring(trainer.delivery.pack(ready))


def _try_out(trainer: Trainer, compiler: Compiler, blocks: Sequence[CompiledForward]) -> bool:
    """Bring a batch through both passes, so that what cannot be compiled is known before anything is trained.

    It is always the first batch of the run, since kernels are tuned to the sizes that they first see, and a resumed run is to have the same
    ones; and as many samples at once as the run has learned to take.

    Returns:
        Whether there was memory for it. If not, the first step recovers.
    """
    batch = _first_batch(trainer)
    count = len(batch.samples)
    parts = parts_of(count, trainer.recovery.samples_at_once.get(bucket_of(batch), count))
    trained = [parameter for parameter in trainer.parameters if parameter.requires_grad]

    def both_passes() -> bool:
        for rows in parts:
            with drawn_as_whole(count, rows):
                with trainer.autocast():
                    loss = trainer.step.losses(batch, 0, 0, rows).mean()
                torch.autograd.grad(loss, trained, allow_unused=True)  # adds no gradient to any parameter, and runs no hook of one
        return True

    try:
        return attempt(both_passes) is not None
    except Stopped:
        raise
    except Exception as error:  # a way back that cannot be compiled, in the words of any compiler
        if compiler.failed == {forward.kind for forward in blocks}:
            raise
        for forward in blocks:
            compiler.give_up(forward.kind, error)
    return attempt(both_passes) is not None  # what is wrong without a compiler, too, is raised here


def _raise_other_cause(stop: StopRequest, error: Exception) -> None:
    """Raise what a compiler may have put in words of its own, or what ended the compiler itself: a signal goes to its processes, too.

    A block that was given up for it would train otherwise than in the run that was not stopped.
    """
    if stop.exit_code is not None:
        raise Stopped("stopped while blocks were compiled", stop.how_to_continue, exit_code=stop.exit_code) from error
    if is_out_of_memory(error):
        raise error
