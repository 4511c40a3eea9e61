"""A checkpoint in one file, in the layout of its makers: where it lies, what it is, which parts are in it, and their tensors.

Only the header is read until a part is loaded. Settings, tokenizers and parts that are not in it come from a model in diffusers layout.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from simpletuner.errors import ConfigError
from simpletuner.models.files import path_hint
from simpletuner.models.hub import fetch_file
from simpletuner.models.recognise import Kind, denoiser_names, is_idle, is_quantised, recognise, vae_names

if TYPE_CHECKING:
    import torch

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (*SAFETENSORS, *PICKLED, ".gguf")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
GROUPS_SHOWN = 5
CONVERT_HINT = "Give the safetensors file of the same model, or a folder in diffusers layout."
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
"""What files call them, to their names in diffusers."""
STATEMENTS: Sequence[tuple[str, Mapping[str, str]]] = (
    ("modelspec.prediction_type", PREDICTIONS),
    ("modelspec.predict_key", PREDICTIONS),  # ComfyUI's name for it
    ("ss_v_parameterization", {"true": "v_prediction", "false": "epsilon"}),  # kohya's
    ("modelspec.architecture", {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}),
)
"""Metadata that say what a model predicts, the surest first."""


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file and what its header says."""

    path: Path
    name: str
    """As the user wrote it."""
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    text_prefixes: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """What stands before the names of each text encoder that the family's files may hold."""

    @cached_property
    def kind(self) -> Kind:
        return recognise(self.shapes)

    def names_of(self, part: str) -> dict[str, str]:
        """Names of a part's tensors as the loaders of diffusers want them, to the names in the file; empty if the part is not in it."""
        if part == "vae":
            return vae_names(self.shapes)
        if part in ("unet", "transformer"):
            found = denoiser_names(self.shapes) if self.kind.family else {}
            # diffusers knows the U-Net of a whole model alone; a file that holds nothing else may leave the beginning out.
            return {f"model.diffusion_model.{name}": whole for name, whole in found.items()} if "input_blocks.0.0.weight" in found else found
        prefix = self.text_prefixes.get(part)
        return {} if prefix is None else {name: name for name in self.shapes if name.startswith(prefix)}

    @cached_property
    def denoiser(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the denoiser's tensors, by names without what stands before them."""
        return {name: self.shapes[whole] for name, whole in denoiser_names(self.shapes).items()}

    def idle_notes(self, parts: Sequence[str]) -> list[str]:
        """How many tensors belong to none of these parts, in a sentence if there are any; what a training leaves beside a model apart."""
        used = {whole for part in parts for whole in self.names_of(part).values()}
        idle = Counter(name.split(".")[0] for name in self.shapes if name not in used and not is_idle(name))
        if not idle:
            return []
        groups = ", ".join(f"{name} ({count})" for name, count in idle.most_common(GROUPS_SHOWN))
        more = f" and {len(idle) - GROUPS_SHOWN} more kinds" if len(idle) > GROUPS_SHOWN else ""
        return [f"{idle.total()} tensors of {self.name} are of no part that is read from it and are left out: {groups}{more}"]

    def tensors(self, part: str, dtype: torch.dtype | None) -> dict[str, Any]:
        """Read one part's tensors, numbers with a point in `dtype`; None leaves them as they are."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            read = {name: file.get_tensor(whole) for name, whole in self.names_of(part).items()}
        return {name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor for name, tensor in read.items()}

    @property
    def schedule(self) -> dict[str, Any]:
        """What the file says of its noise schedule: by the keys `v_pred` and `ztsnr` of derivatives of SDXL, or in its metadata."""
        found: dict[str, Any] = {}
        if self._prediction is not None:
            found["prediction_type"] = self._prediction[0]
        if "ztsnr" in self.shapes:
            found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return found

    @property
    def schedule_marks(self) -> str:
        """Where `schedule` is from."""
        marks = [self._prediction[1]] if self._prediction is not None else []
        return " and ".join([*marks, *(["its key ztsnr"] if "ztsnr" in self.shapes else [])])

    @property
    def _prediction(self) -> tuple[str, str] | None:
        """What the model predicts, and where the file says so."""
        if "v_pred" in self.shapes:
            return "v_prediction", "its key v_pred"
        for key, values in STATEMENTS:
            stated = values.get(self.metadata.get(key, "").lower())
            if stated is not None:
                return stated, f"its {key}"
        return None


def is_single_file(location: str) -> bool:
    """Tell a file of weights, here or on the web, from a folder or a hub id."""
    path = urlsplit(location).path if is_address(location) else location
    return path.lower().endswith(SUFFIXES) and not Path(location).expanduser().is_dir()


def is_address(location: str) -> bool:
    return re.match(r"https?://", location) is not None


def open_checkpoint(location: str, text_prefixes: Mapping[str, str | tuple[str, ...]]) -> Checkpoint:
    """Read a file's header; a file on the hub is fetched first.

    Args:
        text_prefixes: as in `Checkpoint`.

    Raises:
        ConfigError: there is no such file, it is cut short, or of a kind that is not read.
    """
    path = fetch_checkpoint(location)
    if path.suffix.lower() in PICKLED:
        raise ConfigError(f"{location} is pickled: to read such a file runs the code in it", hint=CONVERT_HINT)
    if path.suffix.lower() == ".gguf":
        raise ConfigError(
            f"{location} is quantised (GGUF), which cannot be trained on here", hint=f"{CONVERT_HINT} base_model_precision quantises it."
        )
    shapes, metadata = read_header(path)
    if is_quantised(shapes):
        raise ConfigError(
            f"{location} is quantised: its weights mean nothing without the scales beside them",
            hint="Give the file of the same model in bf16, fp16 or fp32; base_model_precision quantises it.",
        )
    return Checkpoint(path, location, shapes, metadata, text_prefixes)


def fetch_checkpoint(location: str) -> Path:
    """The file on this machine, downloaded if it is on the hub.

    Raises:
        ConfigError: there is no such file, or the address is none of the hub's.
    """
    if not is_address(location):
        path = Path(location).expanduser()
        if not path.is_file():
            raise ConfigError(f"{location} does not exist", hint=path_hint(location))
        return path
    repository, name, revision = parse_address(location)
    fetched = fetch_file(repository, name, revision)
    if fetched is None:
        raise ConfigError(f"{repository} has no file {name}", hint="Copy the address of the file from the repository's page of files.")
    return fetched


def checkpoint_here(location: str) -> Path | None:
    """The file, if it is on this machine."""
    if not is_address(location):
        path = Path(location).expanduser()
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    repository, name, revision = parse_address(location)
    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def parse_address(location: str) -> tuple[str, str, str]:
    """Repository, file and revision of an address such as https://huggingface.co/maker/model/blob/main/file.safetensors.

    Raises:
        ConfigError: it is no file of a repository on the hub.
    """
    parts = urlsplit(location)
    match = re.fullmatch(r"/([^/]+/[^/]+)/(?:blob|resolve|raw)/([^/]+)/(.+)", unquote(parts.path))
    if parts.netloc not in (*HUB_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc):
        raise ConfigError(f"{location} is not on the hub", hint="Download the file, and give its path here.")
    if match is None:
        raise ConfigError(
            f"{location} is no file of a repository", hint="Such an address reads https://huggingface.co/maker/model/blob/main/file.safetensors."
        )
    return match[1], match[3], match[2]


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of a safetensors file's tensors by name, and its metadata.

    Raises:
        ConfigError: it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes): {error}",
            hint="Download it again; a git clone without git-lfs leaves small text files in place of weights.",
        ) from error
