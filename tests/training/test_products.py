"""Runs whose layers multiply in 8 bits where that is faster, and go on as they began."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simpletuner.memory.products import Product, Timed
from simpletuner.options.diffusion import Diffusion
from simpletuner.training.objective import loss_of
from simpletuner.training.products import Products, describe, tokens_of
from simpletuner.training.step import Step
from simpletuner.types import Batch, Crop, Geometry, Sample
from tests.builders.run import adapter_bytes, command, train_in_process, write_run
from tests.training.families import TINY, family

CPU = torch.device("cpu")
BASE = {"base_model_precision": "int8-matmul", "mixed_precision": "bf16", "eight_bit_products": "auto"}
WIDE, NARROW, OTHER = (Product(outputs, 64, 1024, "int8") for outputs in (4096, 64, 32))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def timings(folder: Path) -> Path:
    (file,) = (folder / "cache" / "timings").iterdir()
    return file


def have_measured(folder: Path, *, eight_bit: float) -> None:
    """Write another measurement in the place of what a run found."""
    rows = json.loads(timings(folder).read_text())
    assert rows
    timings(folder).write_text(json.dumps({name: {"eight_bit": eight_bit, "on_the_fly": 1.0, "plain": 0.9} for name in rows}))


def train(folder: Path, output: str, *options: str) -> bytes:
    """The numbers that a run ends with; its header names the run."""
    assert train_in_process(folder, "--output_dir", output, *options) == 0
    tensors = load_file(folder / output / "pytorch_lora_weights.safetensors")
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


def test_a_choice_is_taken_from_the_measurement_and_a_run_that_goes_on_keeps_it(tmp_path, capsys):
    write_run(tmp_path, **BASE)
    train(tmp_path, "output", "--max_train_steps", "1")
    have_measured(tmp_path, eight_bit=2.0)
    plain = train(tmp_path, "plain")
    said = capsys.readouterr().out
    have_measured(tmp_path, eight_bit=0.5)
    fast = train(tmp_path, "fast")
    shutil.rmtree(tmp_path / "plain" / "checkpoint-6")

    again = train(tmp_path, "plain")

    assert again == plain != fast
    assert "0 of 21 layers multiply in 8 bits; 21, where it is no faster, in bf16" in said
    assert "21 of 21 layers multiply in 8 bits (1.8 x as fast as plain ones" in capsys.readouterr().out
    assert timings(tmp_path).read_text().count('"eight_bit": 0.5') == len(json.loads(timings(tmp_path).read_text()))  # nothing was timed again
    assert train(tmp_path, "pinned", "--eight_bit_products", "none") == plain


def test_a_choice_for_another_precision_is_not_taken_up(tmp_path):
    Products("int8-matmul", frozenset({"block"}), "0 of 1").save(tmp_path)

    assert Products.load(tmp_path, "int8-matmul") == Products("int8-matmul", frozenset({"block"}), "0 of 1")
    assert Products.load(tmp_path, "int8-rotated") is None
    assert Products.load(tmp_path / "elsewhere", "int8-matmul") is None


def test_the_summary_says_what_was_chosen_and_what_was_not_timed():
    products = {"a": WIDE, "b": WIDE, "c": NARROW, "d": OTHER}

    said = describe(products, {WIDE: Timed(1.0, 2.5, 2.0), NARROW: Timed(3.0, 2.0, 1.0), OTHER: None}, torch.bfloat16)

    assert said == (
        "3 of 4 layers multiply in 8 bits (2.0 x as fast as plain ones at 64 to 4096); 1, where it is no faster, in bf16; "
        "for 1 of them no time was left"
    )
    assert describe({"a": WIDE}, {WIDE: None}, torch.float32) == "1 of 1 layers multiply in 8 bits; for 1 of them no time was left"


@pytest.mark.parametrize("name", ["auraflow", "flux", "sdxl"])
def test_tokens_counted_on_shapes_are_those_of_a_step(name):
    built, size = family(name), TINY[name].size
    captions = ("a cat", "a dog")
    text = built.encode_text(built.load_text_encoders(CPU, torch.float32), captions)
    shape = (2, built.latent_spec(built.vae_config).channels, size.height // built.vae_stride, size.width // built.vae_stride)
    samples = tuple(Sample("pictures", caption, "00", Geometry(size, size, Crop(0, 0, size.width, size.height)), (caption,)) for caption in captions)
    batch = Batch(samples, captions, {"mean": torch.randn(shape), "std": torch.rand(shape)}, text)
    denoiser, process, seen = built.load_denoiser(torch.float32, 0), built.process(Diffusion()), dict[str, int]()
    for layer_name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, given, key=layer_name: seen.__setitem__(key, given[0].numel() // given[0].shape[-1]))
    step = Step(built, denoiser, NoAdapter(), process, loss_of(Diffusion(), process), CPU, 0, 0, False)
    step.losses(batch, 0, 0)

    found = tokens_of(step, batch)

    assert found == seen and len(set(found.values())) > 1


class NoAdapter:
    """What a step asks of an adapter."""

    def at_time(self, time: torch.Tensor) -> None:
        pass


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path):
    write_run(tmp_path, **BASE, pictures=8, train_batch_size=1)

    process = command(tmp_path, "--num_processes", "2")
    output, _ = process.communicate(timeout=240)

    assert process.returncode == 0, output
    assert output.count("layers multiply in 8 bits") == 1
    assert len(adapter_bytes(tmp_path)) > 0
