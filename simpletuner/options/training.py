"""Options of the run: how long, in what batches, what is saved when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from simpletuner.options.option import Problem, Section, option


class Training(Section):
    """How long the run is, how large its steps are, and what it keeps."""

    output_dir: Path = option(Path("output"), ask="Folder for checkpoints, pictures and the result?")
    """Folder for checkpoints, validation pictures, logs and the result."""

    seed: int = option(42, ge=0)
    """All of a run's randomness comes from this number; the same seed and data give the same run."""

    max_train_steps: int = option(0, ask="How many steps?", ge=0)
    """Optimizer steps of the whole run; 0 leaves the length to `num_train_epochs`."""

    num_train_epochs: int | None = option(None, ge=0)
    """Times that every image is seen, repeats included, if `max_train_steps` is not set; 1 if neither is."""

    train_batch_size: int = option(1, ask="Images in a batch?", ge=1)
    """Images that are trained on at once, on each accelerator."""

    gradient_accumulation_steps: int = option(1, ge=1)
    """Batches that make one optimizer step; as good as a larger batch, in less memory and more time."""

    checkpoint_step_interval: int = option(500, ask="Save every how many steps?", was=["checkpointing_steps"], ge=0)
    """Optimizer steps between checkpoints; 0 saves at the end alone."""

    checkpoint_epoch_interval: int | None = option(None, ge=1, advanced=True)
    """Epochs between checkpoints, besides those that `checkpoint_step_interval` asks for."""

    checkpoints_total_limit: int = option(5, was=["save_total_limit"], ge=0)
    """Checkpoints that are kept, the newest ones; 0 keeps all."""

    resume_from_checkpoint: str | None = option("latest", may_be_empty=True)
    """Where a run goes on: `latest`, a checkpoint's folder name, or empty to begin anew."""

    use_ema: bool = option(False, ask="Also keep a smoothed average of the weights?")
    """Also keep a moving average of what is trained, which is smoother, and save it in ema/."""

    ema_decay: float = option(0.995, ge=0, lt=1, advanced=True)
    """Share of the average that stays at each update."""

    ema_device: Literal["accelerator", "cpu"] = option("accelerator", advanced=True)
    """Where the average is held, 4 bytes a trained number. On the `cpu` every update waits for a copy from the accelerator."""

    ema_update_interval: int = option(1, ge=1, advanced=True)
    """Optimizer steps between updates of the average."""

    ema_warmup_steps: int = option(0, ge=0, advanced=True)
    """Optimizer steps during which the average is a plain copy."""

    deterministic: bool = option(False, advanced=True)
    """Use only operations that give the same bytes each time on a GPU. Slower; on the CPU it is so anyway."""

    torch_num_threads: int = option(0, ge=0, advanced=True)
    """CPU threads that PyTorch may use; 0 is one a core."""

    num_processes: int = option(1, ge=1, advanced=True)
    """Processes to train with, one for each accelerator; the train command starts them itself."""

    @property
    def images_per_step(self) -> int:
        """How many pictures an optimizer step takes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes

    def problems(self) -> Iterator[Problem]:
        if self.max_train_steps and self.num_train_epochs:
            yield Problem(
                ("max_train_steps", "num_train_epochs"), "max_train_steps and num_train_epochs both say how long the run is; set one of them to 0"
            )
