"""What modules of the LyCORIS library add to a Linear or convolution, from their factors, without ever building the change of the weight.

The change is kron(A, U D), as in `added_product`. LoHa's, (U1 D1) times (U2 D2) element by element, has such factors as well: each column of U is
the product of one of U1 and one of U2, and each row of D of those of D1 and D2, so that the ranks are multiplied. That is less work than the
weight where ranks are small.

Letters: B pictures, m l groups of inputs and outputs, i o channels in each of them, r rank. I = m i, O = l o.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from simpletuner.adapters.added_product import Factors, add_product, times

LOHA_SHARE = 0.5
"""Of a layer's numbers: LoHa is computed from its factors where they have no more. On a CPU in bf16, what LoHa adds to a step of a layer took 0.05
of the library's time at a share of 0.04 and 0.30 at 0.38, and still 0.93 at 0.89."""


def quicken(modules: list[Any]) -> None:
    """Have these modules of a LyCORIS network, those that can, answer from here instead of by the library's own factored form."""
    for module in modules:
        if module.bypass_mode and _is_plain(module):
            module.bypass_forward = Factored(module)


class Factored:
    """What a module of LoKr, LoRA, LoCon or LoHa gives in its layer's place; takes the place of the library's own method.

    For each call that one casts every factor, copies the activations into another order of axes and back (in convolutions all five axes),
    and passes over what is added once each for the scale, the scalar and the sum. Autograd keeps three of these copies. LoHa's builds the weight.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_convolution = module.module_type != "linear"

    def __call__(self, x: Tensor, scale: float = 1.0) -> Tensor:
        module = self._module
        base: Tensor = module.org_forward(x)
        factors = _factors(module, scale)
        if self._is_convolution:
            return base + _convolved(x, factors, module.kw_dict, len(module.shape) - 2)
        return add_product(base, x, *factors)


def _convolved(x: Tensor, factors: Factors, window: Any, kernel: int) -> Tensor:
    """What is added to a convolution's answer, (B, I, ...) to (B, O, ...).

    Args:
        window: stride, padding and dilation of the first product.
        kernel: axes of a picture.
    """
    mix, down, up = (None if factor is None else factor.to(x.dtype) for factor in factors)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[kernel - 1]
    pictures, groups = len(x), 1 if mix is None else mix.shape[1]
    if down is not None:
        x = convolve(x.reshape(pictures * groups, -1, *x.shape[2:]), down, None, **window)  # (B m, r, ...)
    if mix is not None:
        by_group = x.reshape(pictures, groups, -1)
        x = torch.bmm(mix.expand(pictures, -1, -1), by_group).view(pictures * len(mix), -1, *x.shape[2:])  # (B l, r, ...)
    if up is not None:
        x = convolve(x, up, None, **({} if down is not None else window))  # (B l, o, ...)
    return x.reshape(pictures, -1, *x.shape[2:])


def _factors(module: Any, scale: float) -> Factors:
    """The factors of a module of the library, their products of parameters alone built: these are small."""
    scale = float(module.scale) * scale
    kernel = module.shape[2:]
    ones = [1] * len(kernel)
    if isinstance(module, LoConModule):
        return None, module.lora_down.weight, times(module.lora_up.weight, scale)
    if isinstance(module, LohaModule):
        up = (module.hada_w1_a[:, :, None] * times(module.hada_w2_a, scale)[:, None]).flatten(1)  # (O, r r)
        down = (module.hada_w1_b[:, None] * module.hada_w2_b).flatten(0, 1)  # (r r, I)
        return None, down.view(len(down), -1, *kernel), up.view(*up.shape, *ones)
    mix = times(module.lokr_w1 if module.use_w1 else module.lokr_w1_a @ module.lokr_w1_b, scale)
    if module.use_w2:
        return _whole(mix, module.lokr_w2)
    up, down = module.lokr_w2_a, module.lokr_w2_b  # (o, r) and (r, i k)
    rank, outputs, inputs = up.shape[1], up.shape[0], down.shape[1]
    if not kernel and rank * (inputs + outputs) >= inputs * outputs:
        return _whole(mix, up @ down)
    return mix, down.view(rank, -1, *kernel), up.view(outputs, rank, *ones)


def _whole(mix: Tensor, factor: Tensor) -> Factors:
    """Groups are mixed where there is less of them: of inputs, before the factor (o, i, ...), or of outputs, after it."""
    return (mix, None, factor) if factor.shape[0] > factor.shape[1] else (mix, factor, None)


def _is_plain(module: Any) -> bool:
    """Whether a module is of those that are computed here: no Tucker core between its factors, no groups of channels, no dropout; LoHa if its
    factors are small."""
    if type(module) not in (LokrModule, LoConModule, LohaModule) or module.tucker or module.wd:
        return False
    if type(module) is LohaModule:
        outputs, inputs = module.shape[0], math.prod(module.shape[1:])
        if module.lora_dim**2 * (inputs + outputs) > LOHA_SHARE * inputs * outputs:
            return False
    layer = module.org_module[0]
    window_differs = getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros"
    drops = bool(module.rank_dropout) or not isinstance(module.drop, nn.Identity)
    return not (window_differs or drops)
