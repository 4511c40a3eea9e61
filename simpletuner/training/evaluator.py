"""Loss on held-out pictures: at noise and times that never change, so that only the model moves it.

What it measures is the squared error of the denoiser's answer, without masks, weights or adaptive losses: figures of runs with
different settings can be laid side by side. It draws nothing from the randomness of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from simpletuner.console import Console
from simpletuner.data.loader import Loader
from simpletuner.errors import MemoryLimitError
from simpletuner.memory.residency import release
from simpletuner.options.validation import Validation
from simpletuner.randomness import seed_from
from simpletuner.reporting.tracker import Trackers
from simpletuner.training.ema import Ema
from simpletuner.training.evaluations import Book
from simpletuner.training.pace import Rhythm
from simpletuner.training.recovery import Recovery, attempt, bucket_of
from simpletuner.training.step import Step, resting
from simpletuner.types import Batch, Sample

BANDS = 4
"""Parts of the time from data to noise of which the loss is also given by itself."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The mean loss of one dataset, overall and by band of time, least noise first."""

    mean: float
    bands: tuple[float, ...]

    def values(self, dataset: str) -> dict[str, float]:
        """By the names that trackers get."""
        name = f"loss/val/{dataset}"
        edges = [f"{100 * band // BANDS}-{100 * (band + 1) // BANDS}" for band in range(BANDS)]
        return {name: self.mean, **{f"{name}/noise_{edge}": loss for edge, loss in zip(edges, self.bands) if not math.isnan(loss)}}


class Evaluator:
    """Evaluates when it is due; all processes call it and share the work."""

    def __init__(
        self,
        *,
        step: Step,
        loader: Loader,
        held_out: Mapping[str, Sequence[Sample]],
        options: Validation,
        is_stopped: Callable[[], bool],
        batch_size: int,
        recovery: Recovery,
        output_dir: Path,
        ema: Ema | None,
        trackers: Trackers,
        accelerator: Accelerator,
        console: Console,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """
        Args:
            step, loader: of the training; nothing of them is changed.
            held_out: dataset id to its samples.
            is_stopped: asked between pictures; once it says yes, looking ends early.
            batch_size: times of one picture that go through the denoiser at once.
            recovery: knows how many of them do where memory runs out, see `validate`.
        """
        self._step, self._loader, self._batch_size, self._autocast, self._is_stopped = step, loader, batch_size, autocast, is_stopped
        self._samples = dict(held_out)
        self._times = [(number + 0.5) / options.eval_timesteps for number in range(options.eval_timesteps)]
        self._recovery = recovery
        self._ema = ema if options.ema_validation != "none" else None
        self._book = Book(output_dir)
        self._trackers, self._accelerator, self._console = trackers, accelerator, console

    def describe(self, rhythm: Rhythm | None) -> str:
        """Say in a line what is looked at and when; empty if nothing is."""
        sizes = ", ".join(f"{len(samples)} images of {name}" for name, samples in self._samples.items())
        when = f"{rhythm} and at the end" if rhythm and rhythm.is_ever else "at the start and the end"
        return f"{sizes} at {len(self._times)} noise levels, {when}" if sizes else ""

    def before_training(self, step: int) -> None:
        """Evaluate what training starts from, once a run."""
        if step == 0:
            self.validate(0)

    def validate(self, step: int) -> None:
        """Evaluate after `step` optimizer steps, and write it down; returns early, with nothing written, once the run is to stop.

        Where memory runs out fewer times go through at once, at the same noise. If one alone is too much there is no loss of this step: a mean
        without some pictures could not be laid beside the others. That is said, and the training goes on.
        """
        if not self._samples:
            return
        sums = self._sums_of_all(step)
        ends = torch.tensor([self._is_stopped(), sums is None], device=self._step.device)
        stopped, failed = self._accelerator.gather(ends).reshape(-1, 2).any(0).tolist()
        if failed:
            less = "Offloading (enable_group_offload) takes less. The training goes on"
            self._console.warn(f"no held-out loss of step {step}: there was too little memory. {less}")
        if stopped or sums is None or failed:
            return
        found = {name: losses for name, one in sums.items() if (losses := self._together(one)) is not None}
        if not found or not self._accelerator.is_main_process:
            return
        values = {key: value for name, losses in found.items() for key, value in losses.values(name).items()}
        try:
            self._book.put(step, values)
        except OSError as error:
            self._console.warn(f"the held-out loss of step {step} cannot be written down: {error}. The training goes on")
        self._trackers.log(step, values)
        said = ", ".join(f"{losses.mean:.4f} on {name}" for name, losses in found.items())
        self._console.say(f"step {step}: held-out loss {said}")

    def catch_up(self, step: int) -> None:
        """Evaluate a step that was due, if the run ended before it came to it."""
        is_there = torch.tensor([step in self._book.values("loss")], device=self._step.device)
        if not bool(self._accelerator.gather(is_there).any()):
            self.validate(step)

    def move_later(self, step: int, aside: Path) -> None:
        """Put what was found after `step` beside checkpoints that are not continued."""
        self._book.move_later(step, aside)

    def drop_later(self, step: int) -> None:
        """Forget what was found after `step`, when the run goes on from there."""
        self._book.drop_later(step)

    def _sums_of_all(self, step: int) -> dict[str, Tensor] | None:
        """What `_sums` gives of each dataset; None if memory ran out for good."""

        def look() -> dict[str, Tensor]:
            with torch.no_grad(), resting(self._step.denoiser, self._step.adapter), self._ema.swapped_in() if self._ema else nullcontext():
                return {name: self._sums(samples, step) for name, samples in self._samples.items()}

        try:
            sums = attempt(look)
        except MemoryLimitError as error:
            self._console.warn(error.message)  # its hint is for steps, which take more than a look
            sums = None
        if sums is None:
            release()
        return sums

    def _sums(self, samples: Sequence[Sample], step: int) -> Tensor:
        """Losses of this process's share of the pictures, added up by band: loss and count, (bands, 2)."""
        sums = torch.zeros(BANDS, 2)
        for sample in samples[self._accelerator.process_index :: self._accelerator.num_processes]:
            batch = None if self._is_stopped() else self._loader.batch_of(sample)
            for start in range(0, len(self._times) if batch is not None else 0, self._batch_size):
                times = self._times[start : start + self._batch_size]
                assert batch is not None
                where, kind = f"the held-out loss of step {step} with pictures of {bucket_of(batch)}", f"held-out {bucket_of(batch)}"
                for time, loss in zip(times, self._recovery.answers(where, kind, times, partial(self._batch_losses, batch))):
                    sums[int(time * BANDS)] += torch.tensor([loss, 1.0])
        return sums

    def _together(self, sums: Tensor) -> Losses | None:
        """The mean over pictures and times of all processes; None if no picture could be used."""
        total = self._accelerator.reduce(sums.to(self._step.device)).double().cpu()
        if not total[:, 1].sum():
            return None
        return Losses(float(total[:, 0].sum() / total[:, 1].sum()), tuple((total[:, 0] / total[:, 1]).tolist()))

    def _batch_losses(self, batch: Batch, times: Sequence[float]) -> list[float]:
        """Losses of one picture at several times."""
        batch = repeated(batch, len(times))
        step, device = self._step, self._step.device
        latents = step.family.scale_latents(batch.latents["mean"].float())  # (B, C, h, w)
        noise = torch.stack([noise_of(batch.samples[0], time, latents.shape[1:]) for time in times])
        noised = step.process.add_noise(latents.to(device), noise.to(device), torch.tensor(times, device=device))
        drawn = [step.process.draw_guidance(1, torch.Generator().manual_seed(seed_from("evaluation", f"{time:.6f}"))) for time in times]
        guidance = [one for one in drawn if one is not None]
        if guidance:
            noised = replace(noised, guidance=torch.cat(guidance).to(device))
        with self._autocast():
            prediction = step.predict(noised, batch)
        losses: list[float] = (prediction.float() - noised.target.float()).square().flatten(1).mean(1).tolist()
        return losses


def repeated(batch: Batch, count: int) -> Batch:
    """A batch of one sample, so many times."""

    def many(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}

    return Batch(
        batch.samples * count, batch.prompts * count, many(batch.latents), many(batch.text), references=tuple(many(one) for one in batch.references)
    )


def noise_of(sample: Sample, time: float, shape: Sequence[int]) -> Tensor:
    """The noise of one picture at one time, the same in every run."""
    generator = torch.Generator().manual_seed(seed_from("evaluation noise", sample.id, f"{time:.6f}"))
    return torch.randn(*shape, generator=generator)
