"""Memory that runs out in a step: freed and tried again, then the batch goes through in parts, and no sample is ever left out.

What is drawn for a sample does not depend on the parts, so that the gradient is that of the whole batch but for rounding. A failure in the
middle of a backward pass may leave some of its gradients behind: all of the step's are dropped, and it starts anew from its first batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from simpletuner.data.row_encoder import is_out_of_memory
from simpletuner.errors import MemoryLimitError
from simpletuner.memory.residency import release
from simpletuner.options.memory import Memory
from simpletuner.training.parts import parts_of
from simpletuner.types import Batch

FILE = "recovery.json"
Item = TypeVar("Item")
Answer = TypeVar("Answer")
Backward = Callable[[Batch, int, slice], Tensor]
"""A batch, its number in the step and the rows that go through now, to their share of the step's loss; gradients are added up."""


def no_more_room() -> bool:
    return False


def attempt(work: Callable[[], Answer]) -> Answer | None:
    """What some work gives, or None if memory ran out. The error ends here: its traceback holds on to tensors."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def attempt_twice(work: Callable[[], Answer]) -> Answer | None:
    """What some work gives, or gives once what is free was given back; None if memory ran out both times."""
    found = attempt(work)
    if found is None:
        release()
        found = attempt(work)
    return found


class Recovery:
    """What this run has learned of how much goes through at once, by the size of the pictures.

    It only ever learns to take less, and checkpoints hold it, so that a run that goes on from one does as the run that never stopped.
    """

    def __init__(
        self,
        conditions: Mapping[str, Any],
        warn: Callable[[str], None],
        advice: str = "",
        more_room: Callable[[], bool] = no_more_room,
    ) -> None:
        """
        Args:
            conditions: what memory depends on; what was learned under others is forgotten. Only a digest of them is written.
            warn: told of each event.
            advice: what to do when one picture alone is too much.
            more_room: moves more of the model off the device; whether it could.
        """
        self._conditions = hashlib.blake2b(json.dumps(conditions, sort_keys=True).encode(), digest_size=8).hexdigest()
        self._warn, self._advice, self._more_room = warn, advice, more_room
        self.samples_at_once: dict[str, int] = {}
        self.events = 0
        self._is_told = True

    def gradients(
        self, step: int, batches: Iterator[Batch], count: int, backward: Backward, forget: Callable[[], None]
    ) -> tuple[Tensor, Sequence[Batch]]:
        """Bring the batches of an optimizer step through both passes.

        Args:
            step: its number, for messages.
            count: batches to take.
            forget: drops the gradients that were gathered so far.

        Returns:
            The loss of the step, and the batches.

        Raises:
            MemoryLimitError: one sample alone is too much.
        """
        taken: list[Batch] = []
        total: Tensor | None = None
        is_first = True
        number = 0
        while number < count:
            if number == len(taken):
                taken.append(next(batches))
            loss = self._try(taken[number], number, backward)
            if loss is not None:
                total, number = loss if total is None else total + loss, number + 1
                continue
            total = None
            forget()
            release()
            bucket, size = bucket_of(taken[number]), len(taken[number].samples)
            done = "tried again" if is_first else self._take_less(bucket, size, f"step {step} with a single picture of {bucket}")
            self._say(f"step {step} with pictures of {bucket}", done)
            is_first, number = False, 0
        assert total is not None
        return total, taken

    def answers(self, where: str, kind: str, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Answer]]) -> list[Answer]:
        """Bring items through work that leaves nothing behind, as looks at the model do, fewer at once where memory runs out.

        Args:
            where: what it is, for messages.
            kind: what is of one size, in `samples_at_once`.
            work: items to an answer each, which do not depend on how many there are.

        Raises:
            MemoryLimitError: one item alone is too much.
        """
        done: list[Answer] = []
        is_first = True
        while len(done) < len(items):
            part = items[len(done) : len(done) + self.samples_at_once.get(kind, len(items))]
            found = attempt(partial(work, part))
            if found is not None:
                done += found
                continue
            release()
            if not is_first and len(part) == 1:  # to offload more would slow the training down, for a look at it
                raise MemoryLimitError(f"memory ran out in {where}, one at once", hint=self._advice or None)
            self._say(where, "tried again" if is_first else self._take_less(kind, len(part), where))
            is_first = False
        return done

    def _try(self, batch: Batch, number: int, backward: Backward) -> Tensor | None:
        """The loss of a batch, or None if memory ran out."""
        parts = parts_of(len(batch.samples), self.samples_at_once.get(bucket_of(batch), len(batch.samples)))
        losses = attempt(lambda: [backward(batch, number, rows) for rows in parts])
        return None if losses is None else sum(losses[1:], losses[0])

    def _take_less(self, kind: str, count: int, alone: str) -> str:
        """Split this kind's batches further, or else move more of the model off the device; what was done, in words.

        Args:
            alone: what was done when one was too much, for the error.
        """
        at_once = min(count, self.samples_at_once.get(kind, count))
        if at_once > 1:
            self.samples_at_once[kind] = (at_once + 1) // 2
            return f"from here on its batches go through {self.samples_at_once[kind]} at once"
        if self._more_room():
            return "more of the model is offloaded"
        raise MemoryLimitError(f"memory ran out in {alone}", hint=self._advice or None)

    def _say(self, where: str, done: str) -> None:
        self.events += 1
        self._is_told = False
        self._warn(f"memory ran out in {where}: {done}")

    def figures(self) -> dict[str, float]:
        """What trackers get after a step in which memory ran out; nothing after others."""
        if self._is_told:
            return {}
        self._is_told = True
        least = {f"memory/samples_at_once_{bucket.replace(' ', '_')}": float(count) for bucket, count in self.samples_at_once.items()}
        return {"memory/ran_out": float(self.events), **least}

    def describe(self) -> str:
        """Say in a line what happened in the run; empty if nothing did."""
        if not self.events:
            return ""
        split = ", ".join(f"batches of {bucket} went through {count} at once" for bucket, count in sorted(self.samples_at_once.items()))
        times = {1: "once", 2: "twice"}.get(self.events, f"{self.events} times")
        return f"memory ran out {times}; no picture was left out" + (f"; {split}" if split else "")

    def agree(self, accelerator: Accelerator) -> None:
        """Have all processes take as little at once as the one that takes least. All of them call it, before a checkpoint."""
        if accelerator.num_processes == 1:
            return
        mine = self.events
        self.samples_at_once, self.events = together(gather_object([(self.samples_at_once, self.events)]))
        if self.events > mine:
            self._is_told = False
            self._warn(f"on another process {self.describe()}")

    def saving(self) -> Callable[[Path], None]:
        """Give what writes, at any time, what was learned up to now beside a checkpoint; nothing if memory never ran out."""
        learned = {"conditions": self._conditions, "samples_at_once": self.samples_at_once, "events": self.events}
        text = json.dumps(learned, indent=2) + "\n" if self.events else ""

        def write(folder: Path) -> None:
            if text:
                (folder / FILE).write_text(text, encoding="utf-8")

        return write

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, if anything."""
        file = folder / FILE
        if not file.is_file():
            return
        learned = json.loads(file.read_text(encoding="utf-8"))
        self.events = learned["events"]
        if learned["conditions"] == self._conditions:
            self.samples_at_once = learned["samples_at_once"]


def together(learned: Sequence[tuple[Mapping[str, int], int]]) -> tuple[dict[str, int], int]:
    """What several processes learned: the least samples at once of each bucket, and the events of the one that had most.

    Not their sum, which would count those before the last checkpoint again.
    """
    buckets = dict.fromkeys(bucket for one, _ in learned for bucket in one)
    return {bucket: min(one[bucket] for one, _ in learned if bucket in one) for bucket in buckets}, max(events for _, events in learned)


@contextmanager
def updating(step: int) -> Iterator[None]:
    """Name what happened if memory runs out while weights are updated: that is not tried again, as some may have their update already.

    Raises:
        MemoryLimitError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"memory ran out while the optimizer updated the weights in step {step}",
            hint="Take an optimizer that remembers less, such as adamw_bf16 or optimi-lion, or lower resolution.",
        ) from None


def bucket_of(batch: Batch) -> str:
    return str(batch.samples[0].geometry.bucket)


def conditions_of(options: Memory, batch_size: int, device: torch.device) -> dict[str, Any]:
    """What the memory of a step depends on, as far as it may change between starts."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**options.model_dump(mode="json"), "train_batch_size": batch_size, "device": name}


def advice_of(options: Memory, *, is_full: bool) -> str:
    """What is left to do where one picture is too much, the cheapest first."""
    ways = []
    if not options.gradient_checkpointing:
        ways.append("set gradient_checkpointing")
    elif options.gradient_checkpointing_segment_stride > 1:
        ways.append("leave gradient_checkpointing_segment_stride out")
    elif options.gradient_checkpointing_backend != "offload":
        ways.append("set gradient_checkpointing_backend to offload")
    if options.base_model_precision == "no_change" and not is_full:
        ways.append("set base_model_precision to int8-quanto")
    ways += ["train adapters with model_type lora" if is_full else "offload the base with enable_group_offload", "lower resolution"]
    text = ", ".join(ways[:-1]) + f", or {ways[-1]}."
    return text[0].upper() + text[1:]
