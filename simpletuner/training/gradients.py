"""From accumulated gradients to an update: average over processes, check, clip."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

PIECE = 1 << 25
"""Numbers that are copied at once, where something is done with copies of all that is trained: more would take memory, fewer time."""


def average_over_processes(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Make every process hold the mean gradient, as few flat pieces of `PIECE` numbers at most, or a single tensor: each is one collective.

    Done by hand because an adapter's parameters are not part of the denoiser that a DDP wrapper would see.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # unused on this process this step, but perhaps not on another
            parameter.grad = torch.zeros_like(parameter)
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        gradients = [parameter.grad for parameter in parameters if parameter.dtype == dtype and parameter.grad is not None]
        for piece in pieces(gradients, PIECE):
            flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in piece]), reduction="mean")
            for gradient, mean in zip(piece, flat.split([gradient.numel() for gradient in piece])):
                gradient.copy_(mean.view_as(gradient))


def pieces(tensors: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Part tensors, in their order, into runs of at most `most` numbers, or of a single tensor."""
    piece, size = list[Tensor](), 0
    for tensor in tensors:
        if piece and size + tensor.numel() > most:
            yield piece
            piece, size = [], 0
        piece.append(tensor)
        size += tensor.numel()
    if piece:
        yield piece


def is_beyond_repair(loss: float, norm: float, scaler: torch.amp.GradScaler) -> bool:
    """Whether a step's figures mean that the run is lost.

    fp16 scaling skips steps whose gradients overflow, by design, and halves its scale each time; it cannot mend a loss, and below
    a scale of 1 it is not the scale that makes gradients overflow: all further steps would be skipped.
    """
    if not math.isfinite(loss):
        return True
    return not math.isfinite(norm) and not (scaler.is_enabled() and scaler.get_scale() >= 1)


def clip(parameters: Sequence[nn.Parameter], limit: float, method: str) -> Tensor:
    """Limit the gradients in place; 0 only measures.

    Args:
        method: "norm" scales all of them so that their joint L2 norm is at most `limit`; "tensor" scales each so that its own is; "value"
            clamps each element.

    Returns:
        The L2 norm before clipping, a scalar on the parameters' device. It is not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if method == "tensor" and limit > 0 and gradients:
        return _clip_each(gradients, limit)
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0:
        if method == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        elif method == "value":
            torch.nn.utils.clip_grad_value_(parameters, limit)
    return norm


@torch.no_grad()
def _clip_each(gradients: list[Tensor], limit: float) -> Tensor:
    """Do with each what `clip_grad_norm_` does with one, in a few calls for all of them. Gives the norm of the whole before it."""
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (limit / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, factors.unbind())
    return torch.linalg.vector_norm(norms)
