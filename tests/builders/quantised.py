"""A network quantised in place, as a run quantises the one that it loads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from simpletuner.memory.settle import recipe_of, settle


def quantise(network: nn.Module, name: str, keep: Sequence[str] = ()) -> int:
    """Quantise and freeze, in the dtype and on the device that it has; gives the number of layers quantised."""
    some = next(network.parameters())
    return settle(network, recipe_of(name, some.dtype, some.device, keep))
