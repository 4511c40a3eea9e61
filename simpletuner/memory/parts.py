"""A weight taken apart into the plain tensors that it is made of, and put together from others: the same for plain and for quantised weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def parts_of(weight: Tensor) -> list[Tensor]:
    """The plain tensors that hold a weight's numbers, in a fixed order; they share its memory."""
    if hasattr(weight, "__tensor_flatten__"):  # quanto's and torchao's
        names, _ = weight.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(weight, name))]
    state: Any = getattr(weight, "quant_state", None)  # bitsandbytes', a plain tensor with its scales in an attribute
    plain = weight.detach().as_subclass(Tensor)
    if state is None:
        return [plain]
    return [plain, state.absmax, *([state.state2.absmax] if state.state2 is not None else [])]


def made_of(like: Tensor, parts: Sequence[Tensor]) -> nn.Parameter:
    """A frozen weight of the same kind, of other tensors; it shares their memory.

    Args:
        like: the weight whose kind, shape and settings are taken.
        parts: one for each of `parts_of(like)`, all on one device.
    """
    left = iter(parts)
    made = _made_of(like, left)
    assert next(left, None) is None, "more parts than the weight has"
    # Making a parameter of it would take bitsandbytes' scales away.
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=False)


def _made_of(like: Tensor, parts: Iterator[Tensor]) -> Tensor:
    if hasattr(like, "__tensor_flatten__"):
        names, context = like.__tensor_flatten__()
        inner = {name: _made_of(getattr(like, name), parts) for name in names}
        made: Tensor = type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())  # type: ignore[attr-defined]
        return made
    plain, state = next(parts), getattr(like, "quant_state", None)
    if state is None:
        return plain
    weight: Any = copy.copy(like)
    weight.data = plain
    weight.quant_state = _state_of(state, plain.device, parts)
    return weight


def _state_of(state: Any, device: torch.device, parts: Iterator[Tensor]) -> Any:
    """Scales of bitsandbytes: a copy with other numbers, and its small tables on the device."""
    made = copy.copy(state)
    made.absmax, made.code = next(parts), state.code.to(device)
    if state.state2 is not None:  # the scales are quantised themselves
        made.offset, made.state2 = state.offset.to(device), copy.copy(state.state2)
        made.state2.absmax, made.state2.code = next(parts), state.state2.code.to(device)
    return made


def bytes_of(weight: Tensor) -> int:
    """Bytes of a weight's numbers, in whatever form they are."""
    return sum(part.numel() * part.element_size() for part in parts_of(weight))
