"""How far a prediction is from its target: one number a sample.

Letters: B batch, C latent channels, h w latent pixels, d = prediction - target, c the error at which Huber losses turn from
quadratic to linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from simpletuner.errors import ConfigError, choose


def l2(d: Tensor, c: float) -> Tensor:
    """d^2. Has no c."""
    return d.square()


def huber(d: Tensor, c: float) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c): d^2 where |d| is far below c, 2 c |d| far above."""
    return c * smooth_l1(d, c)


def smooth_l1(d: Tensor, c: float) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c): d^2 / c where |d| is far below c, 2 |d| far above.

    Written as 2 d^2 / (sqrt(d^2 + c^2) + c), which is the same; the difference of two near numbers would lose the small errors
    in float32.
    """
    squared = d.square()
    return 2 * squared / (torch.sqrt(squared + c * c) + c)


LOSSES: Mapping[str, Callable[[Tensor, float], Tensor]] = {"l2": l2, "huber": huber, "smooth_l1": smooth_l1}
"""`loss_type` to the loss of each element."""


def loss(name: str, prediction: Tensor, target: Tensor, huber_c: float = 0.1) -> Tensor:
    """Mean loss of each sample.

    Args:
        name: a row of `LOSSES`.
        prediction, target: (B, C, h, w), any floating dtype; compared in float32.
        huber_c: c of the Huber losses, above 0.

    Returns:
        float32, (B,).
    """
    return LOSSES[name](prediction.float() - target.float(), huber_c).flatten(1).mean(1)


def loss_function(name: str, huber_c: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Give the loss of a run: (prediction, target), each (B, C, h, w), to (B,).

    Raises:
        ConfigError: no such loss.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss_type {name!r} does not exist", hint=choose(name, LOSSES, "losses"))
    return partial(loss, name, huber_c=huber_c)
