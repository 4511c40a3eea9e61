"""A whole small run in a folder: tiny AuraFlow, a few pictures, the three files a user writes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from tests.builders.auraflow import build_tiny_auraflow

ROOT = Path(__file__).parents[2]


@functools.cache
def tiny_model() -> Path:
    """One tiny AuraFlow a test process."""
    return build_tiny_auraflow(Path(tempfile.mkdtemp(prefix="tiny-auraflow-")))


def add_pictures(folder: Path, count: int, size: tuple[int, int] = (40, 40), first: int = 0) -> None:
    """Write pictures of random noise, named by what a filename caption should say."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = numpy.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{number:03d}.png")


def write_run(folder: Path, *, pictures: int = 6, datasets: list[dict[str, Any]] | None = None, model: Path | None = None, **options: Any) -> Path:
    """Lay a run into `folder` and give the path of its config.json; `options` are added to it, None removes.

    Args:
        model: of another family than AuraFlow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model or tiny_model(), folder / "model", dirs_exist_ok=True)
    if pictures and not (folder / "pictures").exists():
        add_pictures(folder / "pictures", pictures)
    plain = {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename", "crop": True, "crop_style": "center"}
    embeds = {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"}
    (folder / "multidatabackend.json").write_text(json.dumps([*(datasets or [plain]), embeds]))
    lokr = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4}
    preset = {"target_module": ["Attention", "FeedForward"]}
    (folder / "lycoris_config.json").write_text(json.dumps({**lokr, "apply_preset": preset}))
    config: dict[str, Any] = {
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "lycoris_config.json",
        "model_family": "auraflow",
        "pretrained_model_name_or_path": "model",
        "tokenizer_max_length": 24,
        "data_backend_config": "multidatabackend.json",
        "output_dir": "output",
        "resolution": 32,
        "resolution_type": "pixel",
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "checkpoint_step_interval": 3,
        "learning_rate": 1e-2,
        "seed": 7,
        "torch_num_threads": 1,
        "plan_memory": False,
        "run_report": False,
        "eight_bit_products": "all",
        **options,
    }
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}, indent=2))
    return path


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `simpletuner train` in `folder` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "simpletuner", "train", "--config", "config.json", *arguments]
    return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_in_process(folder: Path, *arguments: str) -> int:
    """Run `simpletuner train` in this process, which saves the seconds that imports take."""
    from simpletuner.cli.main import main

    before = Path.cwd()
    os.chdir(folder)
    try:
        return main(["train", "--config", "config.json", *arguments])
    finally:
        os.chdir(before)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "output" / "pytorch_lora_weights.safetensors").read_bytes()
