"""`lora_format`: what a run leaves for other software, and goes on from itself."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tests.builders.run import train_in_process, write_run

PLAIN = {"lora_type": "standard", "lycoris_config": None, "lora_rank": 2, "lora_alpha": 3.0, "validation_prompt": None}


def test_a_run_ends_with_a_file_in_the_layout_that_was_asked_for_and_goes_on_from_its_own(tmp_path, capsys):
    for name, layout in (("own", "diffusers"), ("comfyui", "comfyui")):
        write_run(tmp_path / name, **PLAIN, lora_format=layout, use_ema=layout == "comfyui", max_train_steps=2, checkpoint_step_interval=1)
        assert train_in_process(tmp_path / name) == 0

    own, output = load_file(tmp_path / "own/output/pytorch_lora_weights.safetensors"), tmp_path / "comfyui/output"
    for place in ("pytorch_lora_weights", "ema/pytorch_lora_weights", "checkpoint-1/pytorch_lora_weights-comfyui"):
        assert {key.split(".")[0] for key in load_file(output / f"{place}.safetensors")} == {"diffusion_model"}
    saved = load_file(output / "checkpoint-2/pytorch_lora_weights.safetensors")
    assert saved.keys() == own.keys() and all(torch.equal(saved[key], value) for key, value in own.items())
    assert sorted(path.name for path in output.glob("*.safetensors")) == ["pytorch_lora_weights.safetensors"]
    assert "load_lora_weights" not in capsys.readouterr().out.split("Done in")[2]

    train_in_process(tmp_path / "comfyui", "--max_train_steps", "3")
    train_in_process(tmp_path / "own", "--max_train_steps", "3")
    saved, own = (load_file(tmp_path / name / "output/checkpoint-3/pytorch_lora_weights.safetensors") for name in ("comfyui", "own"))
    assert all(torch.equal(saved[key], value) for key, value in own.items())


def test_a_layout_that_cannot_hold_the_adapter_is_refused_before_anything_is_trained(tmp_path, capsys):
    write_run(tmp_path, lora_format="kohya", validation_prompt=None)
    (tmp_path / "lycoris_config.json").write_text('{"algo": "ia3", "apply_preset": {"target_module": ["Attention"]}}')

    assert train_in_process(tmp_path) == 2

    assert "format kohya cannot hold ia3" in capsys.readouterr().err
    assert not list((tmp_path / "output").glob("checkpoint-*")) and not list((tmp_path / "output").glob(".layout-*"))
