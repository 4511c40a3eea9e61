"""Adapter files: safetensors whose bytes follow from their content alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from simpletuner.adapters.adapter import ADAPTER_FILE
from simpletuner.errors import ConfigError

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PEFT_FILE = "adapter_model.safetensors"
"""What PEFT calls an adapter's file."""
SHOWN = 3
"""Keys named in an error before the rest is only counted."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write float tensors and text about them, among it the digest of the tensors by which other tools know the file.

    The library's own writer puts metadata in an order that changes from call to call, so that two equal runs would
    leave different files.
    """
    metadata = {**metadata, **digests(tensors)}
    names = _in_order(tensors)
    header: dict[str, object] = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            file.write(_bytes_of(tensors[name]))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of all that follows a file's header, as the model specification and the WebUI's extra networks want it."""
    digest = hashlib.sha256()
    for name in _in_order(tensors):
        digest.update(_bytes_of(tensors[name]))
    return {"modelspec.hash_sha256": f"0x{digest.hexdigest()}", "sshs_model_hash": digest.hexdigest()}


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide tensors first, which keeps all of them aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_of(path: Path) -> Path:
    """The adapter file that a path means: itself, or the one in a folder that a run or PEFT saved; the former's name where there is none."""
    return next((path / name for name in (ADAPTER_FILE, PEFT_FILE) if (path / name).is_file()), path / ADAPTER_FILE) if path.is_dir() else path


def read(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file to the CPU; of a folder, the adapter file in it."""
    path = file_of(path)
    if not path.is_file():
        raise ConfigError(f"no adapter at {path}", hint="Give a folder that a run or PEFT saved, or a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}", hint="Copy it again, or use another checkpoint.") from error


def names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, or in the adapter file in a folder."""
    with safe_open(file_of(path), framework="pt") as file:
        return list(file.keys())


def metadata_of(path: Path) -> dict[str, str]:
    """Read what a safetensors file, or the adapter file in a folder, says of itself."""
    with safe_open(file_of(path), framework="pt") as file:
        return dict(file.metadata() or {})


def check_keys(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a file that lacks something or holds something else."""
    found, expected = set(found), set(expected)
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (("missing", expected - found), ("unused", found - expected))
        if names
    ]
    if problems:
        raise ConfigError(
            f"the weights in {path} do not fit this adapter: {'; '.join(problems)}",
            hint="They must come from the same kind of adapter with the same targets, on the same model.",
        )


def check_shapes(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another shape, and name the first."""
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ConfigError(
                f"{name} in {path} has shape {list(found[name].shape)}, this adapter wants {list(tensor.shape)}",
                hint="Train with the rank, factor and targets that the file was made with; for others choose another output_dir, or begin anew with "
                "--resume_from_checkpoint= (empty).",
            )
