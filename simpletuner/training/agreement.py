"""Whether all processes stop: a signal may have reached one of them only, or others a step later, and all must end with the same step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from simpletuner.training.meter import Coming


class Agreement:
    """What the processes know together of having been asked to stop. All of them ask it the same, in the same order."""

    def __init__(self, accelerator: Accelerator, device: torch.device, asked: Callable[[], int | None]) -> None:
        """
        Args:
            asked: the exit code if this process was asked to stop.
        """
        self._accelerator, self._device, self._asked = accelerator, device, asked
        self._coming: Coming | None = None

    def now(self) -> int | None:
        """The exit code if any process was asked by now. Waits for all of them, and for their devices."""
        self._coming = None  # whoever was asked then is so still
        return self._asked() if self._accelerator.num_processes == 1 else _code(Coming(self._gather()))

    def after_step(self) -> int | None:
        """The exit code if any process had been asked after the step before this one. Does not wait for what the device still computes."""
        if self._accelerator.num_processes == 1:
            return self._asked()
        before, self._coming = self._coming, Coming(self._gather())
        return None if before is None else _code(before)

    def _gather(self) -> Tensor:
        """The largest exit code of all processes, 0 if none was asked, (1,)."""
        mine = torch.full((1,), self._asked() or 0, device=self._device)  # made there: a copy would be waited for
        codes: Tensor = self._accelerator.gather(mine)
        return codes.max().reshape(1)


def _code(coming: Coming) -> int | None:
    (code,) = coming.read()
    return int(code) or None
