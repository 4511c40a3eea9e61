"""Read a frozen network layer by layer: each goes from its file to its final form and place before the next one is read.

The weights of the whole network are therefore never in memory in the form of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from simpletuner.models.mapped import MappedFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FORGET_BYTES = 1 << 27
"""Of a file's memory that is given back at a time."""


class Settling(Protocol):
    """Called with each module of a network in turn, whose weights are views of a file; it owns what it gives."""

    def __call__(self, name: str, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Give the module in its final form: itself, or what takes its place. `dtype` is of its plain numbers, where the library demands one."""
        ...

    def finish(self) -> None: ...


class Settle(Protocol):
    """How a network is to be held: what is done with its layers, and what its other numbers become."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def begin(self, network: nn.Module) -> Settling: ...


def settle_layers(network: nn.Module, settle: Settle, files: Sequence[MappedFile]) -> nn.Module:
    """Bring every module of a network of views into its final form, and forget the files as they are read.

    Args:
        network: frozen; its buffers are its own already.
    """
    settling, unread = settle.begin(network), 0
    for name in [name for name, _ in network.named_modules()]:  # names, since a list of modules would keep those that are replaced
        module = network.get_submodule(name)
        unread += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        settled = settling(name, module, _demanded_dtype(network, name, settle.dtype))
        if settled is not module:
            network.set_submodule(name, settled)
        if unread >= FORGET_BYTES:
            unread = 0
            for file in files:
                file.forget()
    settling.finish()
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(settle.device, copy=True)
    return network.eval().requires_grad_(False)


def network_of_views(kind: type[Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Build a network of diffusers around tensors in its own layout.

    Args:
        dtype: that its buffers are made in, as `from_pretrained` makes them.

    Returns:
        The network, and the names of what the tensors lack.
    """
    with _empty_weights(dtype):
        network: nn.Module = kind.from_config(dict(config))
    wanted = network.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in wanted and wanted[name].shape == tensor.shape}
    for name, buffer in network.named_buffers():
        if name in fitting and buffer.is_floating_point():
            fitting[name] = fitting[name].to(dtype)
    network.load_state_dict(fitting, strict=False, assign=True)
    return network, sorted(set(wanted) - set(fitting))


def transformer_of_views(kind: type[Any], folder: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, Mapping[str, Any]]:
    """Build a network of transformers around tensors in any layout that the library reads; it copies none whose dtype is the widest of them.

    Args:
        dtype: that its buffers are made in, as `from_pretrained` makes them.

    Returns:
        The network, and what the library says of missing and other keys.
    """
    import torch

    widest = widest_dtype(tensors.values())
    config = kind.config_class.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        network, found = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=widest, output_loading_info=True)
    if widest != dtype:
        with _empty_weights(dtype):
            empty: nn.Module = kind(config)
        stored = network.state_dict()
        for name, buffer in empty.named_buffers():
            if name not in stored:
                owner, _, key = name.rpartition(".")
                network.get_submodule(owner)._buffers[key] = buffer
    return network, found


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The one of their dtypes, of numbers with a point, that loses nothing of the others."""
    return max((tensor.dtype for tensor in tensors if tensor.is_floating_point()), key=lambda dtype: dtype.itemsize)


def cast_buffers(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point buffers, as `from_single_file` does."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(dtype) if buffer.is_floating_point() else buffer


def _demanded_dtype(network: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype | None:
    """Float32 for modules that the library keeps so where others are in 16 bits; transformers' only where they are float16."""
    import torch

    whole = type(network).__module__
    names: list[str] = list(getattr(network, "_keep_in_fp32_modules", None) or [])
    if whole.startswith("transformers.") and dtype != torch.float16:
        names = []
    names += list(getattr(network, "_keep_in_fp32_modules_strict", None) or [])
    return torch.float32 if set(names) & set(name.split(".")) else None


@contextmanager
def _empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Build networks with parameters on the meta device and buffers in `dtype`, and leave torch's generators as they are."""
    import torch
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            yield
    finally:
        torch.set_default_dtype(before)
