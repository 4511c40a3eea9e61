"""Adapter files."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.adapters import weights
from simpletuner.errors import ConfigError


def test_the_library_reads_what_was_written(tmp_path):
    tensors = {
        "b.half": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(2, 3, 4).transpose(0, 2),
        "wide": torch.randn(3, dtype=torch.float64),
        "scalar": torch.tensor(4.0),
        "empty": torch.empty(0, 3),
    }

    weights.write(tmp_path / "adapter.safetensors", tensors, {"said": "zwölf", "format": "pt"})

    found = load_file(tmp_path / "adapter.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    content = (tmp_path / "adapter.safetensors").read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert metadata == {"said": "zwölf", "format": "pt", "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def test_the_same_content_gives_the_same_bytes(tmp_path):
    contents = set()

    for order in ("abcdefg", "gfedcba", "cabgfed"):
        weights.write(tmp_path / "file", {name: torch.arange(5.0) for name in order}, {key: key for key in order})
        contents.add((tmp_path / "file").read_bytes())

    assert len(contents) == 1


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"not tensors")

    with pytest.raises(ConfigError, match=r"adapter\.safetensors"):
        weights.read(tmp_path / "adapter.safetensors")


def test_missing_and_unused_keys_are_named_and_counted(tmp_path):
    with pytest.raises(ConfigError) as error:
        weights.check_keys(tmp_path, ["a", "b"], ["a", "c", "d", "e", "f"])

    assert "4 missing (c, d, e, ...)" in error.value.message
    assert "1 unused (b)" in error.value.message
