"""The loop: for each step, train; report; when due, save and look; stop when asked."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from simpletuner.adapters.adapter import Adapter, Keep, Write, as_it_is
from simpletuner.console import Bar, Console
from simpletuner.data.loader import Loader
from simpletuner.errors import MemoryLimitError, SimpleTunerError, Stopped
from simpletuner.optim.averaging import averaged, restore_trained, trained_values
from simpletuner.optim.build import restore, set_rate
from simpletuner.options.optim import Optim
from simpletuner.reporting.tracker import Trackers
from simpletuner.training.agreement import Agreement
from simpletuner.training.checkpoint import CheckpointFolder
from simpletuner.training.delivery import Delivery
from simpletuner.training.ema import Ema
from simpletuner.training.evaluations import Progress
from simpletuner.training.gradients import average_over_processes, clip, is_beyond_repair
from simpletuner.training.meter import Figures, Meter
from simpletuner.training.pace import Pace
from simpletuner.training.parts import WHOLE, drawn_as_whole
from simpletuner.training.recovery import Recovery, updating
from simpletuner.training.release import Release
from simpletuner.training.saving import Saver, save_torch
from simpletuner.training.signals import StopRequest
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.types import Batch

NO_PROBE = nullcontext()
SMOOTHED_STEPS = 20
"""Steps over which the loss and the time in the progress line are averaged; trackers get those of each step."""


class Looks(Protocol):
    """Looks at the model when that is due; a Validator renders pictures, an Evaluator measures. All processes call it."""

    def validate(self, step: int) -> None:
        """Look at what the training has come to after a step; may return early once the run is to stop."""

    def catch_up(self, step: int) -> None:
        """Do that if it was not done."""


class Trainer:
    """One run with all its parts in place."""

    def __init__(
        self,
        *,
        step: Step,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        optim: Optim,
        scaler: torch.amp.GradScaler,
        ema: Ema | None,
        recovery: Recovery,
        loader: Loader,
        pace: Pace,
        state: TrainState,
        accelerator: Accelerator,
        checkpoints: CheckpointFolder,
        metadata: Mapping[str, str],
        write_extras: Callable[[Path], None],
        validator: Looks,
        evaluator: Looks,
        probes: Iterator[AbstractContextManager[None]],
        trackers: Trackers,
        console: Console,
        stop: StopRequest,
        autocast: Callable[[], AbstractContextManager[None]],
        release: Release | None = None,
        on_saved: Callable[[Path], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            probes: contexts that the first steps are taken in.
            autocast: gives the context in which a batch is trained on.
            release: steps the optimizer in the backward pass, if gradients are not to be held until its end.
            on_saved: is given the folder of each checkpoint that is finished; see `Saver`.
            progress: tells after evaluations whether the run may end before its last step.
        """
        self.step, self.adapter, self.optimizer, self.schedule, self.optim = step, adapter, optimizer, schedule, optim
        self.scaler, self.ema, self.loader, self.pace, self.state = scaler, ema, loader, pace, state
        self.accelerator, self.checkpoints, self.validator, self.evaluator = accelerator, checkpoints, validator, evaluator
        self.metadata, self.write_extras = metadata, write_extras
        self.trackers, self.console, self.stop, self.autocast = trackers, console, stop, autocast
        self.recovery, self.probes, self.release = recovery, probes, release
        self.parameters = list(adapter.parameters().values())
        self.meter, self.delivery = Meter(), Delivery(step.device)
        self.agreement = Agreement(accelerator, step.device, lambda: stop.exit_code)
        self.saver = Saver(checkpoints, step.device, console, stop, on_saved)
        self.progress, self.ends_early = progress, False
        self.recent: deque[Figures] = deque(maxlen=SMOOTHED_STEPS)

    def run(self) -> None:
        """Train from the state in hand to the last step.

        Raises:
            Stopped: a signal came; the state was saved.
            OSError: a checkpoint cannot be written.
            SimpleTunerError: the loss or a gradient is not finite.
        """
        batches = self.batches()
        with (
            closing(self.trackers),
            closing(batches),
            self.stop.deferred(),
            self.saver.running(),
            self.console.bar("training", self.pace.total_steps, "steps", self.state.step) as bar,
        ):
            for look in self._looks_at(self.state.step) if self.state.step else ():
                with averaged(self.optimizer):
                    look.catch_up(self.state.step)
                self._end_if_asked(self.agreement.now())
            self.meter.restart_clock()
            self.ends_early = self.state.step < self.pace.total_steps and self.progress is not None and self.progress.is_over()
            while self.state.step < self.pace.total_steps and not self.ends_early:
                self.advance(batches, bar)

    def advance(self, batches: Iterator[Batch], bar: Bar) -> None:
        """Take one optimizer step and do what is due after it."""
        with next(self.probes, NO_PROBE):
            figures = self._optimizer_step(batches)
        self.saver.check()
        self._report(figures, bar)
        self._do_what_is_due(bar)

    def batches(self) -> Generator[Batch, None, None]:
        """The batches from here to the last step, of this process."""
        first, accumulation = self.state.step, self.pace.accumulation

        def make_ready(batch: Batch, number: int) -> Batch:
            steps, micro_step = divmod(number, accumulation)
            return self.delivery.pack(self.step.make_ready(batch, first + steps, micro_step))

        position, world = self.state.position + self.accelerator.process_index, self.accelerator.num_processes
        return self.loader.iterate(position, stride=world, count=(self.pace.total_steps - first) * accumulation, make_ready=make_ready)

    def _optimizer_step(self, batches: Iterator[Batch]) -> Figures | None:
        """Accumulate, average, clip, update. Gives the figures of the step before."""
        number = self.state.step
        learning_rate = set_rate(self.optimizer, self.schedule(number))
        self.adapter.at_share(number / self.pace.total_steps)
        if self.release is not None:
            self.release.begin(number + 1)
        total, samples = self._accumulate(batches, number)
        norm = self._update(number + 1) if self.release is None else self.release.finish()
        if self.ema is not None:
            self.ema.update(number + 1)
        epoch = self.state.epoch
        self._count()
        return self.meter.put(number + 1, total, norm, learning_rate, epoch, samples)

    def _update(self, step: int) -> Tensor:
        """Average the gradients, clip them, and update the weights. Gives the length of the whole gradient before it was clipped."""
        average_over_processes([parameter for parameter in self.parameters if parameter.requires_grad], self.accelerator)
        self.scaler.unscale_(self.optimizer)
        norm = clip(self.parameters, self.optim.max_grad_norm, self.optim.grad_clip_method)
        with updating(step):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _forget(self) -> None:
        """Drop the gradients of a step that is to begin again."""
        if self.release is not None:
            self.release.refuse_if_torn()
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, batches: Iterator[Batch], number: int) -> tuple[Tensor, tuple[str, ...]]:
        """Gather the gradients of a step. Gives its loss, and the ids of its samples."""
        try:
            total, taken = self.recovery.gradients(number + 1, batches, self.pace.accumulation, self._backward, self._forget)
        except MemoryLimitError:
            is_torn = self.release is not None and self.release.is_torn
            if self.accelerator.num_processes == 1 and number and not is_torn:  # others would wait for ever
                self.save(is_last=True)
            raise
        figures = self.recovery.figures()
        if figures:
            self.trackers.log(number + 1, figures)
        return total, tuple(sample.id for batch in taken for sample in batch.samples)

    def _backward(self, batch: Batch, micro_step: int, rows: slice) -> Tensor:
        """Bring some samples of a batch through both passes, and give their share of the step's loss."""
        count, batch = len(batch.samples), self.delivery.bring(batch)
        with drawn_as_whole(count, rows):
            with self.autocast():
                losses = self.step.losses(batch, self.state.step, micro_step, rows)
                loss = (losses.mean() if rows == WHOLE else losses.sum() / count) / self.pace.accumulation
            is_last = micro_step == self.pace.accumulation - 1 and rows.stop in (None, count)
            with self.release.whole_after(is_last) if self.release is not None else nullcontext():
                self.scaler.scale(loss).backward()
        return loss.detach()

    def _count(self) -> None:
        position = self.state.position + self.pace.accumulation * self.accelerator.num_processes
        epoch, _ = self.loader.locate(position)
        self.state = replace(self.state, step=self.state.step + 1, position=position, epoch=epoch)

    def _report(self, figures: Figures | None, bar: Bar) -> None:
        if figures is None:
            return
        if is_beyond_repair(figures.loss, figures.grad_norm, self.scaler):
            self._fail(figures)
        self.trackers.log(figures.step, figures.values())
        self.recent.append(figures)
        loss = statistics.fmean(one.loss for one in self.recent)
        seconds = statistics.median(one.seconds for one in self.recent)
        bar.advance(1, f"loss {loss:.4f}  lr {figures.learning_rate:.2e}  {seconds:.2f} s/step")

    def _fail(self, figures: Figures) -> None:
        what = "gradient norm" if math.isfinite(figures.loss) else "loss"
        self.saver.settle()
        last = self.checkpoints.latest()
        kept = f"The last good checkpoint is {last.folder.name}" if last else "No checkpoint was written yet"
        raise SimpleTunerError(
            f"the {what} of step {figures.step} is not a finite number (loss {figures.loss}, gradient norm {figures.grad_norm}); "
            f"its samples: {', '.join(figures.samples[:8])}",
            hint=f"{kept}. Lower learning_rate, set max_grad_norm, or look at these images and captions.",
        )

    def _do_what_is_due(self, bar: Bar) -> None:
        step = self.state.step
        saves, looks = step == self.pace.total_steps or self.pace.save.is_due(step), self._looks_at(step)
        # What is due waits for the device anyway, so that a stop may be asked for at once; otherwise it comes a step later where there are others.
        stop_code = self.agreement.now() if saves or looks else self.agreement.after_step()
        saves, looks = saves or stop_code is not None, looks if stop_code is None else []
        if not (saves or looks):
            return
        self._report(self.meter.take(), bar)
        if saves:
            self.save(is_last=stop_code is not None)
        for look in looks:
            if stop_code is None:
                with averaged(self.optimizer):
                    look.validate(step)
                stop_code = self.agreement.now()  # a signal ends the pictures early
        self._end_if_asked(stop_code)
        if looks and self.progress is not None:
            self.progress.note()
            if step < self.pace.total_steps and self.progress.is_over():
                self._end_early(looks)
        self.meter.restart_clock()

    def _end_early(self, looked: Sequence[Looks]) -> None:
        """Do what is due at the end, and take no further step."""
        self.save(is_last=True)
        due = [*([self.evaluator] if self.pace.evaluate is not None else []), *([self.validator] if self.pace.validate.is_ever else [])]
        for look in [one for one in due if one not in looked]:
            with averaged(self.optimizer):
                look.validate(self.state.step)
            self._end_if_asked(self.agreement.now())
        self.ends_early = True

    def _looks_at(self, step: int) -> list[Looks]:
        """Who looks at what the training has come to after this step."""
        is_last, pace = step == self.pace.total_steps, self.pace
        evaluates = pace.evaluate is not None and (is_last or pace.evaluate.is_due(step))
        validates = pace.validate.is_ever and (is_last or pace.validate.is_due(step))
        return [*([self.evaluator] if evaluates else []), *([self.validator] if validates else [])]

    def _end_if_asked(self, exit_code: int | None) -> None:
        if exit_code is None:
            return
        self.save(is_last=True)  # does nothing where this step is saved already
        where = f"stopped at step {self.state.step} of {self.pace.total_steps}; everything is saved"
        raise Stopped(where, self.stop.how_to_continue, exit_code=exit_code)

    def save(self, *, is_last: bool = False) -> None:
        """Have a checkpoint of the state in hand written. All processes call it; the first one writes, and nobody waits.

        Args:
            is_last: the run ends here, and all wait until it is there.
        """
        self.recovery.agree(self.accelerator)
        if self.accelerator.is_main_process:
            self.saver.save(self.state.step, self._content, is_last=is_last)
        if is_last:
            self.accelerator.wait_for_everyone()

    def _content(self, keep: Keep) -> Sequence[Write]:
        """Take hold of all that a checkpoint holds, and give what writes it."""
        metadata = {**self.metadata, "step": str(self.state.step)}

        def write_adapter(folder: Path) -> None:
            with averaged(self.optimizer):  # after which the weights are other ones
                self.adapter.saving(metadata, as_it_is)(folder)

        adapter: Write = write_adapter
        if keep is not as_it_is:
            with averaged(self.optimizer):
                adapter = self.adapter.saving(metadata, keep)
        saved = {"name": self.optim.optimizer, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        kept = keep({**saved, "trained": trained_values(self.optimizer), "weights": self._held_in()})
        average = keep(self.ema.state_dict()) if self.ema is not None else None

        def write_state(folder: Path) -> None:
            save_torch(kept, folder / "optimizer.pt", self.saver.go_on)
            if average is not None:
                save_torch(average, folder / "ema.pt", self.saver.go_on)

        def flush_trackers(folder: Path) -> None:
            self.trackers.flush()  # a run that goes on from here appends to what they hold

        def tell(folder: Path) -> None:
            self.trackers.events.stage("checkpoint_save")

        return [tell, self.state.save, self.recovery.saving(), adapter, write_state, self.write_extras, flush_trackers]

    def _held_in(self) -> str:
        """The formats of what is trained."""
        return " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.parameters}))

    def _restore_average(self, ema: Ema, file: Path) -> None:
        if file.is_file():
            ema.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        else:
            ema.restart()
            self.console.warn("the checkpoint has no averaged weights: the average starts from the trained ones")

    def restore(self, folder: Path) -> None:
        """Take everything back from a checkpoint with this `_content`, verified."""
        self.state = TrainState.load(folder)
        self.recovery.load(folder)
        self.adapter.load(folder)
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        before, now = saved.get("weights", "float32"), self._held_in()
        if before != now:
            self.console.warn(f"the weights were trained in {before} and now are in {now}: what the optimizer has gathered starts anew")
        elif saved["name"] == self.optim.optimizer:
            restore(self.optimizer, saved["optimizer"])
            restore_trained(self.optimizer, saved.get("trained"))
        else:
            self.console.warn(f"the optimizer changed from {saved['name']} to {self.optim.optimizer}: what it has gathered starts anew")
        if saved["scaler"]:  # empty if the checkpoint was made without fp16
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self._restore_average(self.ema, folder / "ema.pt")
