"""What the mappings of diffusers make of a single file: which tensors of a network it gives, and which of its own have no place there.

Found out on tensors without numbers, so before any of the file's are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.models.recognise import Shapes, is_idle

UNNEEDED = "num_batches_tracked"
"""How names end of what a batch norm counts while it is trained, and reads never."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How the tensors of a file fit a network."""

    missing: tuple[str, ...]
    """Names of the network's parameters and buffers that the file does not give."""
    homeless: tuple[str, ...]
    """Names of the file's tensors that the network has no place for."""
    own_names: frozenset[str] | None
    """Those of the file's tensors that are the network's as they stand; None where a mapping has to rename them."""


def fit(kind: type[Any], config: Mapping[str, Any], shapes: Shapes) -> Fit:
    """Compare a network of diffusers with the tensors of a file in either layout.

    Args:
        kind: its class.
        shapes: of the part's tensors, by the names that the mapping wants.

    Raises:
        KeyError: the mapping misses a tensor, or diffusers has none for this class.
    """
    import torch

    with torch.device("meta"):
        wanted = kind.from_config(dict(config)).state_dict().keys()
    is_named_alike = 2 * len(wanted & shapes.keys()) > len(shapes)
    origins = {name: {name} for name in shapes} if is_named_alike else _origins(kind, config, shapes)
    used = set().union(*(origins[name] for name in wanted & origins.keys()))
    return Fit(
        missing=tuple(name for name in wanted if name not in origins and not name.endswith(UNNEEDED)),
        homeless=tuple(name for name in shapes if name not in used and not _is_mark(name, shapes)),
        own_names=frozenset(wanted & shapes.keys()) if is_named_alike else None,
    )


def _is_mark(name: str, shapes: Shapes) -> bool:
    """Whether a tensor is a sign or a left-over of training rather than a weight."""
    return len(shapes[name]) == 0 or max(shapes[name]) <= 1 or is_idle(name.removeprefix("model.diffusion_model."))


def _origins(kind: type[Any], config: Mapping[str, Any], shapes: Shapes) -> dict[str, Collection[str]]:
    """Names of what the mapping makes, to the names in the file that each was made from."""
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    class Traced(torch.Tensor):
        """A tensor without numbers that remembers what it was made from."""

        origins: frozenset[str]

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = super().__torch_function__(function, types, args, kwargs or {})
            origins = frozenset().union(*(one.origins for one in _flat(args) if isinstance(one, cls)))
            for one in _flat([made]):
                if isinstance(one, cls):
                    one.origins = origins
            return made

    def traced(name: str, shape: Iterable[int]) -> Traced:
        tensor = torch.empty(tuple(shape), device="meta").as_subclass(Traced)
        tensor.origins = frozenset([name])
        return tensor

    mappings: Any = SINGLE_FILE_LOADABLE_CLASSES
    made = mappings[kind.__name__]["checkpoint_mapping_fn"](
        checkpoint={name: traced(name, shape) for name, shape in shapes.items()}, config=dict(config)
    )
    return {name: tensor.origins for name, tensor in made.items() if isinstance(tensor, Traced)}


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
