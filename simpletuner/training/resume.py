"""Where a run goes on from: the newest checkpoint that verifies, one by name, or the beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from simpletuner.console import Console
from simpletuner.errors import ConfigError
from simpletuner.training.checkpoint import Checkpoint, CheckpointFolder
from simpletuner.training.trainer import Trainer


def resume(
    trainer: Trainer,
    wanted: str | None,
    console: Console,
    movers: Sequence[Callable[[int, Path], None]],
    droppers: Sequence[Callable[[int], None]] = (),
) -> str:
    """Bring a trainer to where the run stands.

    Args:
        wanted: "latest", a checkpoint's folder name, or nothing for a fresh start.
        movers: each puts what it found after a step into a folder, both of which it is given, where checkpoints are not continued.
        droppers: each forgets what it found after a step, where a run was cut off after that.

    Returns:
        A line that says where training starts.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or one beyond the last step.
    """
    checkpoint = find(wanted, trainer.checkpoints)
    if checkpoint is not None:
        take_up(trainer, checkpoint, console)
    trainer.accelerator.wait_for_everyone()  # all have read before the first process moves anything
    is_main = trainer.accelerator.is_main_process
    first = checkpoint.step if checkpoint else 0
    aside = trainer.checkpoints.supersede(first) if is_main else None
    if is_main and aside is None:
        for drop in droppers:
            drop(first)
    if aside is not None:
        for move in movers:
            move(first, aside)
        console.warn(f"later checkpoints of this output folder are not continued and were moved to {aside}")
    return f"resumed from {checkpoint.folder.name}" if checkpoint else "from the beginning"


def take_up(trainer: Trainer, checkpoint: Checkpoint, console: Console) -> None:
    """Restore a checkpoint, and refuse one that this run cannot go on from."""
    fresh_digest, assistant = trainer.state.data_digest, trainer.state.assistant
    trainer.restore(checkpoint.folder)
    if trainer.state.assistant != assistant:
        before, now = trainer.state.assistant or "none", assistant or "none"
        console.warn(f"the assistant adapter changed since the checkpoint, from {before} to {now}: training goes on with what is now")
        trainer.state = replace(trainer.state, assistant=assistant)
    if trainer.state.data_digest != fresh_digest:
        console.warn(
            "what is trained on changed since the checkpoint (images, captions, masks, repeats, probability, batch size or seed): "
            "training goes on in the new order"
        )
        # Windows count optimizer steps: with other processes or another accumulation those lie elsewhere in the stream.
        position = trainer.loader.windowed_position(trainer.state.step)
        position = trainer.state.position if position is None else position
        epoch, _ = trainer.loader.locate(position)
        trainer.state = replace(trainer.state, data_digest=fresh_digest, position=position, epoch=epoch)
    if trainer.state.step > trainer.pace.total_steps:
        raise ConfigError(
            f"{checkpoint.folder.name} has {trainer.state.step} steps, the run is to end at {trainer.pace.total_steps}",
            hint="Raise max_train_steps, choose another output_dir, or name an earlier checkpoint in resume_from_checkpoint.",
        )


def find(wanted: str | None, checkpoints: CheckpointFolder) -> Checkpoint | None:
    """Look up the checkpoint that `resume_from_checkpoint` asks for."""
    if not wanted:
        return None
    if wanted == "latest":
        return checkpoints.latest()
    name = Path(wanted).name
    for checkpoint in checkpoints.all():
        if checkpoint.folder.name == name:
            problem = checkpoint.problem()
            if problem:
                raise ConfigError(
                    f"resume_from_checkpoint {name} is damaged: {problem}", hint="Use latest, which takes the newest one that is whole."
                )
            return checkpoint
    there = ", ".join(checkpoint.folder.name for checkpoint in checkpoints.all()) or "none"
    raise ConfigError(
        f"resume_from_checkpoint {wanted!r} is not in the output folder", hint=f"There: {there}. Use latest, or an empty value for a fresh start."
    )
