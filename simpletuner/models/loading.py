"""Read networks from their files: in the wanted precision, without a second copy in memory, and whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError
from simpletuner.models.source import Part

if TYPE_CHECKING:
    import torch

KEYS_SHOWN = 3


def load_network(kind: type[Any], part: Part, dtype: torch.dtype) -> Any:
    """Read a network of diffusers or transformers on the CPU, frozen and in evaluation mode; torch's generators stay as they are.

    Args:
        kind: its class, of either library.

    Raises:
        ConfigError: a file is damaged, or does not hold what the network's configuration asks for.
    """
    import torch
    from safetensors import SafetensorError

    folder, (variant, _) = part.folder(), part.weights()
    precision = {"dtype" if kind.__module__.startswith("transformers.") else "torch_dtype": dtype}
    try:
        with _without_bars(), torch.random.fork_rng(devices=[]):  # some constructors draw numbers that the file then replaces
            network, found = kind.from_pretrained(
                folder, variant=variant, use_safetensors=True, low_cpu_mem_usage=True, output_loading_info=True, **precision
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the {part} cannot be read: {first}", hint="Download it again; its files do not fit together or are damaged.") from error
    _check_keys(part, found)
    return network.eval().requires_grad_(False)


def random_network(kind: type[Any], part: Part, dtype: torch.dtype, seed: int) -> Any:
    """Build a network of diffusers from its configuration alone, with random weights that follow from `seed`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the accelerators' generators too
        network = kind.from_config(part.config())
    return network.to(dtype).eval()


def _check_keys(part: Part, found: Mapping[str, Any]) -> None:
    """Refuse weights with gaps: both libraries fill them with random numbers and a line in the log."""
    missing = [*found["missing_keys"], *(found.get("mismatched_keys") or ())]
    if missing:
        shown = ", ".join(str(key) for key in sorted(missing, key=str)[:KEYS_SHOWN])
        raise ConfigError(
            f"the weights of the {part} lack {len(missing)} tensors that its config.json asks for, such as {shown}",
            hint="The configuration and the weights are of different models.",
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' own bars off the console while a local file is read."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
