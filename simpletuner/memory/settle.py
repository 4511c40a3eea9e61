"""Layers to their final form and place, one at a time: cast or quantised, on the device where they are used."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError
from simpletuner.memory.precision import Row, find, quantiser_of
from simpletuner.memory.quantisers.quantiser import Quantiser
from simpletuner.memory.residency import return_unused
from simpletuner.memory.weight_store import WeightStore

RETURN_BYTES = 1 << 27
"""Of weights that are quantised between two times that unused host memory is given back."""
Place = Callable[[str], torch.device]
WeightBytes = Callable[[str, Tensor], int]
"""A parameter's name and the parameter, to the bytes that it will have."""


def quantiser_here(row: Row, device: str, key: str) -> Quantiser | None:
    """`quantiser_of`, for the device of this process.

    Args:
        device: its type.
    """
    return quantiser_of(row, device, key, torch.cuda.get_device_capability() if device == "cuda" else None)


@dataclass(frozen=True)
class Recipe:
    """How a frozen network is held."""

    row: Row
    dtype: torch.dtype
    """Of all that is not quantised, and of the answers."""
    device: torch.device
    keep: tuple[str, ...] = ()
    """Globs of layer names that are not quantised."""
    key: str = "base_model_precision"
    """The option that asked for it, for messages."""
    through_device: bool = True
    """Whether layers are quantised on the device, which is faster, or in host memory, from where what is bound for the device moves on."""
    placement: Callable[[nn.Module, WeightBytes], Place] | None = None
    """Settles where layers rest, by their names, for a network and the bytes that its weights will have; all on the device if not given."""
    store: WeightStore | None = None
    """Where quantised layers are kept for the next time."""
    quantiser_for: Callable[[Row, str, str], Quantiser | None] = quantiser_here
    """Gives what quantises the layers, of a row, the type of the device and the option's name."""

    def begin(self, network: nn.Module) -> Settling:
        """Choose the layers to quantise. The network may be on the meta device.

        Raises:
            ConfigError: a missing package or compiler, a device that cannot, or nothing to quantise.
        """
        layers = frozenset(name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and self._quantises(name, layer))
        place = self.placement(network, self._bytes_with(layers)) if self.placement is not None else lambda name: self.device
        owners = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
        shared = frozenset(parameter for parameter, count in owners.items() if count > 1)
        quantiser = self.check()
        if quantiser is None:
            return Settling(self, place, shared)
        if not layers:
            what = f"{self.key} {self.row.name} finds no layer to quantise in {type(network).__name__}"
            raise ConfigError(what, hint=f"Set {self.key} to no_change.")
        return Settling(self, place, shared, quantiser, layers)

    def check(self) -> Quantiser | None:
        """Build what quantises layers, if anything does.

        Raises:
            ConfigError: a missing package or compiler, or a device that cannot.
        """
        if self.row.capability is not None and not self.through_device:
            raise ConfigError(f"{self.key} {self.row.name} can be made on the accelerator alone", hint="Set quantize_via to accelerator.")
        return self.quantiser_for(self.row, self.device.type, self.key)

    def _bytes_with(self, layers: Collection[str]) -> WeightBytes:
        bits = self.row.bits
        return lambda name, weight: int(weight.numel() * bits / 8) if name.removesuffix(".weight") in layers else weight.numel() * self.dtype.itemsize

    def _quantises(self, name: str, layer: nn.Linear) -> bool:
        fits = bool(self.row.library) and layer.in_features % self.row.input_multiple == 0 and layer.out_features % self.row.output_multiple == 0
        return fits and not any(fnmatch.fnmatch(name, pattern) for pattern in self.keep)


@dataclass
class Settling:
    """One network on its way; called with each of its modules, whose children are left alone."""

    recipe: Recipe
    place: Place
    shared: frozenset[int] = frozenset()
    """Ids of the parameters that several modules own."""
    quantiser: Quantiser | None = None
    layers: frozenset[str] = frozenset()
    """Names of those that are quantised."""
    _settled: dict[int, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)
    """Shared parameters by their ids, so that they stay one."""
    _unreturned: int = 0
    """Bytes of weights quantised since memory was last given back."""

    def __call__(self, name: str, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Give the module in its final form: itself, or what takes its place.

        Args:
            dtype: of its numbers that are not quantised, where it is another than the recipe's.
        """
        recipe = self.recipe
        place = self.place(name)
        quantises = name in self.layers
        if quantises and (kept := self._kept(name, module, place)) is not None:
            return kept
        first = recipe.device if quantises and recipe.through_device else torch.device("cpu") if quantises else place
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = self._moved(parameter, first, dtype or recipe.dtype)
        if not quantises:
            return module
        assert self.quantiser is not None and isinstance(module, nn.Linear)
        self._unreturned += module.weight.nbytes
        quantised = self.quantiser.quantise(module)
        if recipe.store is not None:
            recipe.store.write(name, *self.quantiser.pack(quantised))
        quantised = quantised.to(place)
        if self._unreturned >= RETURN_BYTES:
            self._unreturned = 0
            return_unused()
        return quantised

    def finish(self) -> None:
        """All modules were there."""
        if self.recipe.store is not None:
            self.recipe.store.seal()

    def _kept(self, name: str, layer: nn.Module, place: torch.device) -> nn.Module | None:
        """The layer as an earlier run quantised it."""
        found = self.recipe.store.read(name) if self.recipe.store is not None else None
        if found is None:
            return None
        assert self.quantiser is not None and isinstance(layer, nn.Linear)
        tensors = {key: tensor.to(self.recipe.device, copy=True) for key, tensor in found[0].items()}
        with torch.device("meta"):
            empty = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=self.recipe.dtype)
        return self.quantiser.unpack(empty, tensors, found[1]).to(place)

    def _moved(self, parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        """A copy, even where nothing changes: the original may be a view of a file."""
        if id(parameter) in self._settled:
            return self._settled[id(parameter)][1]
        value = parameter.detach()
        moved = nn.Parameter(value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True), requires_grad=False)
        if id(parameter) in self.shared:
            self._settled[id(parameter)] = parameter, moved
        return moved


def settle(network: nn.Module, recipe: Recipe) -> int:
    """Bring a network that is whole in memory into its final form, in place.

    Returns:
        The number of layers quantised.

    Raises:
        ConfigError: see `Recipe.begin`.
    """
    settling = recipe.begin(network)
    for name in [name for name, _ in network.named_modules()]:  # names, since a list of modules would keep those that are replaced
        module = network.get_submodule(name)
        settled = settling(name, module)
        if settled is not module:
            network.set_submodule(name, settled)
    settling.finish()
    for module in network.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(recipe.device)
    network.requires_grad_(False)
    return len(settling.layers)


def recipe_of(precision: str, dtype: torch.dtype, device: torch.device, keep: Sequence[str] = (), key: str = "base_model_precision") -> Recipe:
    """The recipe of a precision that a user named.

    Raises:
        ConfigError: there is none of that name.
    """
    return Recipe(find(precision, key), dtype, device, tuple(keep), key)
