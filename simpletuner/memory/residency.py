"""What is held where: dtypes of the frozen parts, and letting go of a part that has done its work."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from simpletuner.options.memory import Memory

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weight_dtype(options: Memory) -> torch.dtype:
    """The dtype that a frozen base is held and computed in."""
    return DTYPES[options.mixed_precision]


def vae_dtype(options: Memory, device: torch.device) -> torch.dtype:
    """The VAE's dtype; by default float32 on the CPU, where 16 bits are slow, and bf16 on accelerators."""
    if options.vae_dtype == "default":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[options.vae_dtype]


def release(*parts: Any) -> None:
    """Give back the memory of networks that are not used again, even while someone still refers to them.

    Their weights are taken away, so that a forgotten reference fails loudly instead of holding gigabytes.

    Args:
        parts: networks, or dataclasses, mappings and sequences of them; anything else in there is left alone. With None alone, of what was
            never loaded, nothing is done: to look for garbage among all that the libraries made takes a second.
    """
    if parts and all(part is None for part in parts):
        return
    for part in parts:
        for network in _networks(part):
            for module in network.modules():
                for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    delattr(module, name)
    gc.collect()
    return_unused()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


def return_unused() -> None:
    """Give back to the system what is free between the tensors in host memory; glibc keeps it otherwise, gigabytes of it after a quantisation."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (TypeError, OSError, AttributeError):  # another C library
        return


def _networks(part: Any) -> list[nn.Module]:
    if isinstance(part, nn.Module):
        return [part]
    if dataclasses.is_dataclass(part):
        return _networks([getattr(part, field.name) for field in dataclasses.fields(part)])
    if isinstance(part, Mapping):
        return _networks(list(part.values()))
    if isinstance(part, (list, tuple)):
        return [network for item in part for network in _networks(item)]
    return []
