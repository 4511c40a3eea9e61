"""Work that is spread over the processes of a run, and put together again on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from simpletuner.errors import SimpleTunerError, Stopped
from simpletuner.training.validation import Interrupted

Given = TypeVar("Given")
Made = TypeVar("Made")


class Share:
    """Gives every process its part of a list."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def map(self, work: Callable[[Sequence[Given]], Sequence[Made | None]], things: Sequence[Given]) -> list[Made | None]:
        """What `work` makes of things, in their order, on all processes. All of them must call it.

        Raises:
            Interrupted: `work` did, in some process.
            SimpleTunerError: it failed in another process; in that one it raises what it failed with. So all of them go the same way on.
        """
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        if world == 1:
            return list(work(things))
        failure: Exception | None = None
        made: Sequence[Made | None] = []
        try:
            made = work(things[rank::world])
        except Stopped:  # a second signal: nobody is waited for
            raise
        except Exception as error:
            failure = error
        told = gather_object([(rank, list(made), None if failure is None else str(failure), isinstance(failure, Interrupted))])
        if failure is not None:
            raise failure
        if any(is_interrupted for *_, is_interrupted in told):
            raise Interrupted
        for other, _, why, _ in told:
            if why is not None:
                raise SimpleTunerError(f"process {other}: {why}")
        parts = {other: list(part) for other, part, *_ in told}
        return [parts[number % world][number // world] for number in range(len(things))]

    def agree(self, failure: Exception | None) -> None:
        """Have all processes raise, where the first one failed in what it did alone."""
        if of_first(self._accelerator, failure is not None):
            raise failure or SimpleTunerError("the first process failed")


def of_first(accelerator: Accelerator, value: bool) -> bool:
    """What the first process says, on all of them."""
    told = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    return told[0]
