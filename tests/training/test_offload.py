"""A run whose blocks wait in main memory learns, looks, stops and goes on as the plain run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.cli.main import main
from tests.builders.run import adapter_bytes, train_in_process, write_run

TLORA = {"algo": "tlora", "linear_dim": 4, "linear_alpha": 4, "apply_preset": {"target_module": ["Attention"]}}
OPTIONS = {
    "gradient_checkpointing": True,
    "model_init": "random",
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "ema_validation": "ema_only",
    "validation_prompt": "a cat",
    "validation_resolution": "32x32",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 2,
}


def lay(folder: Path, **options) -> Path:
    """A run with a denoiser of four blocks."""
    write_run(folder, **{**OPTIONS, **options})
    config = folder / "model" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_single_dit_layers": 3}))
    (folder / "lycoris_config.json").write_text(json.dumps(TLORA))
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "output" / "validation_images").glob("*.png")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = lay(tmp_path_factory.mktemp("plain"))
    assert train_in_process(folder) == 0
    return folder


def test_a_run_with_swapped_blocks_ends_with_the_same_bytes_though_it_was_resumed(plain, tmp_path, capsys):
    folder = lay(tmp_path, max_train_steps=2, blocks_to_swap=3)
    assert train_in_process(folder) == 0
    assert "3 of 4 blocks wait in main memory" in capsys.readouterr().out

    lay(tmp_path)
    assert train_in_process(folder, "--blocks_to_swap", "2") == 0

    assert adapter_bytes(folder) == adapter_bytes(plain)
    assert pictures(folder) == pictures(plain) != {}


def test_pictures_with_group_offload_are_those_without(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(plain)

    for name, options in {"plain": [], "offload": ["--enable_group_offload"]}.items():
        line = ["generate", "a dog", "--adapter", "output", "--output", str(tmp_path / name), "--validation_num_inference_steps", "2", *options]
        assert main(line) == 0

    made = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("plain", "offload")]
    assert made[0] == made[1] != {}


def test_more_blocks_than_the_model_has_are_refused_before_anything_is_encoded(tmp_path, capsys):
    folder = lay(tmp_path, blocks_to_swap=9)

    assert train_in_process(folder) == 2

    assert "blocks_to_swap 9: AuraFlowTransformer2DModel has 4 blocks" in capsys.readouterr().err
    assert not (folder / "cache").exists()
