"""Read networks from their files: in the wanted precision, without a second copy in memory, and whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError
from simpletuner.models.single_file import Checkpoint
from simpletuner.models.source import Part

if TYPE_CHECKING:
    import torch

KEYS_SHOWN = 3


def load_network(kind: type[Any], part: Part, dtype: torch.dtype | None) -> Any:
    """Read a network of diffusers or transformers on the CPU, frozen and in evaluation mode; torch's generators stay as they are.

    Args:
        kind: its class, of either library.
        dtype: None leaves the weights of a single file as they are in it.

    Raises:
        ConfigError: a file is damaged, or does not hold what the network's configuration asks for.
    """
    import torch
    from safetensors import SafetensorError

    if part.checkpoint is not None:
        return _convert(kind, part, part.checkpoint, dtype).eval().requires_grad_(False)
    folder, (variant, _) = part.folder(), part.weights()
    precision = {"dtype" if kind.__module__.startswith("transformers.") else "torch_dtype": dtype}
    try:
        with without_bars(), torch.random.fork_rng(devices=[]):  # some constructors draw numbers that the file then replaces
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


def _convert(kind: type[Any], part: Part, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """Read a network from a single file in its makers' layout, through the mappings of diffusers."""
    import torch
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, create_diffusers_t5_model_from_checkpoint

    folder, tensors = str(part.folder()), checkpoint.tensors(part.name, dtype)
    try:
        with _without_warnings(), torch.random.fork_rng(devices=[]):
            if not kind.__module__.startswith("transformers."):
                network = kind.from_single_file(tensors, config=folder, torch_dtype=dtype)
            elif "T5" in kind.__name__:
                network = create_diffusers_t5_model_from_checkpoint(kind, tensors, config=folder, torch_dtype=dtype, local_files_only=True)
                network.tie_weights()
            else:
                network = create_diffusers_clip_model_from_ldm(kind, tensors, config=folder, torch_dtype=dtype, local_files_only=True)
        empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        reason = f"it lacks {', '.join(empty[:KEYS_SHOWN])}" if empty else None
    except NotImplementedError:  # what torch says of parameters that the file did not fill
        reason = "tensors are missing"
    except KeyError as error:
        reason = f"it lacks {error.args[0]}"
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is None:
        return network
    raise ConfigError(
        f"the {part} does not fit the {part.name}/{part.config_name} of {part.location}: {reason}",
        hint="If the file is whole, set single_file_base_model to a model in diffusers layout of the same architecture.",
    )


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
def _without_warnings() -> Iterator[None]:
    """Keep from the console what diffusers says of tensors that the network has no use for."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own bars off the console while a local file is read or written."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
