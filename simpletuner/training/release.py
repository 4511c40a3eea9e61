"""Updates inside the backward pass: each tensor is stepped as soon as its gradient is whole, and the gradient goes before the next one comes.

One optimizer does it, which is shown a group with that tensor alone: what it remembers is as it would be without, and is saved alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpletuner.errors import MemoryLimitError
from simpletuner.optim.adamw_bf16 import NUMBER
from simpletuner.options.optim import Optim
from simpletuner.training.gradients import clip
from simpletuner.training.recovery import updating

Group = dict[str, Any]


class Release:
    """Steps an optimizer tensor by tensor, while `whole_after` says that the backward pass completes the gradients."""

    def __init__(self, optimizer: Optimizer, options: Optim) -> None:
        self._optimizer, self._limit, self._method = optimizer, options.max_grad_norm, options.grad_clip_method
        self._places = {
            parameter: (index, number)
            for number, (index, parameter) in enumerate((index, one) for index, group in enumerate(optimizer.param_groups) for one in group["params"])
        }
        self._is_whole = False
        self._step = 0
        self._before: list[Group] = []
        self._after: list[Group] = []
        self._norms: list[Tensor] = []
        for parameter in self._places:
            parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self, step: int) -> None:
        """Prepare for an optimizer step, whose rate is set; `step` is its number."""
        self._step, self._norms = step, []
        # What counts steps in a group counts once a step, not once a tensor: each tensor gets the group as it was.
        self._before = [{key: value for key, value in group.items() if key != "params"} for group in self._optimizer.param_groups]
        self._after = [{} for _ in self._before]

    @property
    def is_torn(self) -> bool:
        """Whether some tensors have had the update of a step that is not finished."""
        return bool(self._norms)

    @contextmanager
    def whole_after(self, is_last: bool) -> Iterator[None]:
        """Have the backward pass in the body step what it is done with, if it is the last of the step."""
        self._is_whole = is_last
        try:
            yield
        finally:
            self._is_whole = False

    def finish(self) -> Tensor:
        """End the step. Gives the L2 norm of the whole gradient as it was before clipping."""
        for group, changed in zip(self._optimizer.param_groups, self._after):
            group.update(changed)
        norms, self._norms = self._norms, []
        return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))

    def refuse_if_torn(self) -> None:
        """Say why a step of which memory ran out cannot be tried again, if it cannot.

        Raises:
            MemoryLimitError: some tensors were updated already.
        """
        if not self.is_torn:
            return
        raise MemoryLimitError(
            f"memory ran out in step {self._step} when {len(self._norms)} of {len(self._places)} tensors were updated already: "
            "with optimizer_release_gradients such a step cannot be tried again",
            hint="The last checkpoint is whole, and the same command goes on from it: lower train_batch_size or resolution first.",
        )

    def _update(self, parameter: Tensor) -> None:
        """Step one tensor; autograd calls it when the tensor's gradient is added up."""
        if not self._is_whole:
            return
        assert isinstance(parameter, nn.Parameter)
        index, number = self._places[parameter]
        norm = clip([parameter], self._limit, self._method)
        before, groups = self._before[index], self._optimizer.param_groups
        alone = {**copy.deepcopy(before), NUMBER: number, "params": [parameter]}
        with updating(self._step):
            self._norms.append(norm)
            self._optimizer.param_groups = [alone]
            try:
                self._optimizer.step()
            finally:
                self._optimizer.param_groups = groups
        parameter.grad = None
        self._after[index].update({key: value for key, value in alone.items() if key not in (NUMBER, "params") and _differ(value, before.get(key))})


def _differ(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(before, Tensor):
        return not torch.equal(value, before)
    return type(value) is not type(before) or bool(value != before)
