"""Muon for what has rows and columns, AdamW for the rest, as one optimizer at one rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

Group = dict[str, Any]


def muon(
    params: Iterable[nn.Parameter] | Iterable[Group],
    lr: float = 1e-4,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Build it; kernels of convolutions count as matrices with a row for each output channel.

    An orthogonal update is scaled by 0.2 * sqrt(longer side), so that its size is that of AdamW's and rates carry over
    (Liu et al. 2025, "Muon is scalable for LLM training").

    Args:
        params: parameters, or groups of them.
        momentum, nesterov, ns_steps: of the matrices; `ns_steps` is the number of Newton-Schulz iterations.
        betas, eps: of the rest.
    """
    from pytorch_optimizer import Muon

    given: list[Any] = list(params)
    groups: list[Group] = given if isinstance(given[0], dict) else [{"params": given}]
    of_matrices = {"use_muon": True, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "use_adjusted_lr": True}
    of_the_rest = {"use_muon": False, "betas": tuple(betas), "eps": eps}
    parted: list[Group] = []
    for group in groups:
        for settings, is_matrix in ((of_matrices, True), (of_the_rest, False)):
            mine = [parameter for parameter in group["params"] if (parameter.ndim > 1) == is_matrix]
            if mine:
                parted.append({"lr": lr, "weight_decay": weight_decay, **group, **settings, "params": mine})
    return Muon(parted)
