"""From accumulated gradients to an update: average over processes, check, clip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def average_over_processes(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Make every process hold the mean gradient. Adapters are small: one flat buffer a dtype is one collective.

    Done by hand because an adapter's parameters are not part of the denoiser that a DDP wrapper would see.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # unused on this process this step, but perhaps not on another
            parameter.grad = torch.zeros_like(parameter)
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        gradients = [parameter.grad for parameter in parameters if parameter.dtype == dtype and parameter.grad is not None]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


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
        method: "norm" scales all of them so that their joint L2 norm is at most `limit`; "value" clamps each element.

    Returns:
        The L2 norm before clipping, a scalar on the parameters' device. It is not finite if any gradient is not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0:
        if method == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        else:
            torch.nn.utils.clip_grad_value_(parameters, limit)
    return norm
