"""The frozen base between runs: quantised once, and read from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.memory.quantisers.quanto import Quanto
from tests.builders.run import train_in_process, write_run
from tests.training.families import options_of

OPTIONS = {"base_model_precision": "int8-quanto", "max_train_steps": 2, "mixed_precision": "bf16"}


def refuse(*arguments: object) -> None:
    raise AssertionError("a layer is quantised again")


@pytest.fixture
def once(tmp_path) -> Path:
    """A run on a quantised base that has ended."""
    write_run(tmp_path, **OPTIONS)
    assert train_in_process(tmp_path) == 0
    return tmp_path


def again(folder: Path, **options) -> int:
    return train_in_process(folder, "--output_dir", "again", *(f"--{key}={value}" for key, value in options.items()))


def test_a_second_run_on_the_same_base_quantises_nothing_and_learns_the_same(once, monkeypatch):
    monkeypatch.setattr(Quanto, "quantise", refuse)

    assert again(once) == 0

    first, second = (load_file(once / name / "pytorch_lora_weights.safetensors") for name in ("output", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_another_base_is_quantised_anew(once):
    kept = list((once / "cache" / "weights").iterdir())
    model = next((once / "model" / "transformer").glob("*.safetensors"))
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)

    assert again(once) == 0

    assert len(kept) == 1 and len(list((once / "cache" / "weights").iterdir())) == 2


def test_what_this_machine_cannot_do_is_refused_before_anything_is_made(tmp_path, capfd):
    write_run(tmp_path, base_model_precision="fp8-torchao")

    assert train_in_process(tmp_path) == 2

    assert "base_model_precision fp8-torchao needs a CUDA device of compute capability 8.9" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("targets", "is_said"), [('["ff.net.2"]', True), ('["to_q"]', False)])
def test_what_is_known_of_the_layers_that_are_adapted_is_said(tmp_path, capsys, targets, is_said):
    adapter = {"lora_type": "standard", "lycoris_config": None, "peft_lora_target_modules": targets}
    write_run(tmp_path, **{**options_of("sdxl"), **adapter, "max_train_steps": 1, "resolution": 64})

    assert train_in_process(tmp_path) == 0

    assert ("known to end in NaN" in " ".join(capsys.readouterr().out.split())) is is_said


def test_nothing_is_kept_where_that_is_not_wanted(tmp_path):
    write_run(tmp_path, **OPTIONS, keep_quantised_weights=False)

    assert train_in_process(tmp_path) == 0

    assert not (tmp_path / "cache" / "weights").exists()
