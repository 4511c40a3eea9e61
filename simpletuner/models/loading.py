"""Read networks from their files: in the wanted precision, without a second copy in memory, and whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError
from simpletuner.models import streaming
from simpletuner.models.fitting import Fit, fit
from simpletuner.models.mapped import MappedFile
from simpletuner.models.single_file import Checkpoint
from simpletuner.models.source import Part

if TYPE_CHECKING:
    import torch

Read = Callable[[], dict[str, Any]]
"""Gives a part's tensors; called once it is known that they fit."""
KEYS_SHOWN = 3
OTHER_BASE = "If the file is whole, set single_file_base_model to a model in diffusers layout of the same architecture."


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
        checkpoint = part.checkpoint
        return _convert(kind, part, checkpoint, lambda: checkpoint.tensors(part.name, dtype), dtype).eval().requires_grad_(False)
    folder, (variant, _) = part.folder(), part.weights()
    precision = {"dtype" if kind.__module__.startswith("transformers.") else "torch_dtype": dtype}
    try:
        with without_bars(), torch.random.fork_rng(devices=[]):  # some constructors draw numbers that the file then replaces
            network, found = kind.from_pretrained(
                folder, variant=variant, use_safetensors=True, low_cpu_mem_usage=True, output_loading_info=True, **precision
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(part, error) from error
    _check_keys(part, found)
    return network.eval().requires_grad_(False)


def stream_network(kind: type[Any], part: Part, settle: streaming.Settle) -> Any:
    """Read a network layer by layer to its final form and place, frozen and in evaluation mode; torch's generators stay as they are.

    Args:
        kind: its class, of diffusers or transformers.
        settle: what is done with each layer.

    Raises:
        ConfigError: a file is damaged, or does not hold what the network's configuration asks for; or of what `settle` refuses.
    """
    checkpoint = part.checkpoint
    paths = [part.folder() / name for name in part.weights()[1] if name.endswith(".safetensors")] if checkpoint is None else [checkpoint.path]
    try:
        files = [MappedFile(path) for path in paths]
    except (OSError, ValueError) as error:
        raise _unreadable(part, error) from error
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    if checkpoint is not None:
        views = {name: tensors[whole] for name, whole in checkpoint.names_of(part.name).items()}
        # In the dtype of the file: diffusers would make a copy in float32 otherwise.
        network = _convert(kind, part, checkpoint, lambda: views, streaming.widest_dtype(views.values()))
        streaming.cast_buffers(network, settle.dtype)
    elif kind.__module__.startswith("transformers."):
        try:
            with without_bars():
                network, found = streaming.transformer_of_views(kind, part.folder(), tensors, settle.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(part, error) from error
        _check_keys(part, found)
    else:
        built: Any
        built, missing = streaming.network_of_views(kind, part.config(), tensors, settle.dtype)
        _check_keys(part, {"missing_keys": missing})
        built.register_to_config(_name_or_path=str(part.folder()))
        network = built
    return streaming.settle_layers(network, settle, files)


def random_network(kind: type[Any], part: Part, dtype: torch.dtype, seed: int) -> Any:
    """Build a network of diffusers from its configuration alone, with random weights that follow from `seed`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the accelerators' generators too
        network = kind.from_config(part.config())
    return network.to(dtype).eval()


def _unreadable(part: Part, error: Exception) -> ConfigError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(f"the {part} cannot be read: {first}", hint="Download it again; its files do not fit together or are damaged.")


def _convert(kind: type[Any], part: Part, checkpoint: Checkpoint, read: Read, dtype: torch.dtype | None) -> Any:
    """Make a network of a single file, in its makers' layout through the mappings of diffusers, or in that of diffusers."""
    import torch

    is_text_encoder = kind.__module__.startswith("transformers.")
    try:
        with _without_warnings(), torch.random.fork_rng(devices=[]):
            if is_text_encoder:
                network = _text_encoder(kind, part, read(), dtype)
                missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
            else:
                found = _fit(kind, part, checkpoint)
                missing = list(found.missing)
                network = None if missing else _denoiser_or_vae(kind, part, read(), dtype, found)
        reason = f"it lacks {_some(missing)}" if missing else None
    except NotImplementedError:  # what torch says of parameters that the file did not fill
        reason = "tensors are missing"
    except KeyError as error:
        reason = f"it lacks {error.args[0]}"
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if reason is None:
        return network
    raise ConfigError(f"{_does_not_fit(part)}: {reason}", hint=OTHER_BASE)


def _fit(kind: type[Any], part: Part, checkpoint: Checkpoint) -> Fit:
    """How the file fits the network.

    Raises:
        ConfigError: it holds more than the network, and so is of another one, or is in a layout that nothing maps.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    shapes = {name: checkpoint.shapes[whole] for name, whole in checkpoint.names_of(part.name).items()}
    try:
        found = fit(kind, part.config(), shapes)
    except KeyError as error:
        if kind.__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
            raise ConfigError(
                f"the {part} is in the layout of its makers, in which diffusers reads no {kind.__name__}",
                hint=f"Give the {part.name} in the layout of diffusers: a folder, or the safetensors file in it.",
            ) from error
        raise
    if found.homeless:
        raise ConfigError(
            f"{_does_not_fit(part)}: that network has no place for {len(found.homeless)} of its tensors, such as {_some(found.homeless)}",
            hint=OTHER_BASE,
        )
    return found


def _denoiser_or_vae(kind: type[Any], part: Part, tensors: dict[str, Any], dtype: torch.dtype | None, found: Fit) -> Any:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if found.own_names is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name in found.own_names}
    if kind.__name__ in SINGLE_FILE_LOADABLE_CLASSES:
        return kind.from_single_file(tensors, config=str(part.folder()), torch_dtype=dtype)
    network = kind.from_config(part.config())
    network.load_state_dict(tensors, strict=False, assign=True)
    return network if dtype is None else network.to(dtype)


def _text_encoder(kind: type[Any], part: Part, tensors: dict[str, Any], dtype: torch.dtype | None) -> Any:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, create_diffusers_t5_model_from_checkpoint

    folder = str(part.folder())
    if "T5" not in kind.__name__:
        return create_diffusers_clip_model_from_ldm(kind, tensors, config=folder, torch_dtype=dtype, local_files_only=True)
    network = create_diffusers_t5_model_from_checkpoint(kind, tensors, config=folder, torch_dtype=dtype, local_files_only=True)
    network.tie_weights()
    return network


def _does_not_fit(part: Part) -> str:
    return f"the {part} does not fit the {part.name}/{part.config_name} of {part.location}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - KEYS_SHOWN
    return ", ".join(names[:KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")


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
