"""The lesson35-mnist example: the lesson's shape and sampler, what its recipe writes, and a whole run of it in small."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from diffusers import AuraFlowPipeline
from PIL import Image

from simpletuner.cli.choices import family_of
from simpletuner.cli.commands.train import read_options
from simpletuner.cli.locate import examples, find_config
from simpletuner.errors import ConfigError
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from tests.builders.dataset_hub import CARD, dataset_hub, digits_parquet
from tests.builders.run import ROOT, add_pictures, train_in_process, write_run

LESSON = examples()["lesson35-mnist"]
LESSON_PARAMETERS = 311_569_408
SIZES = ["lesson35-mnist", "lesson35-mnist/small"]
TEXT_TOKENS = 4
CPU = torch.device("cpu")
Velocity = Callable[[torch.Tensor, float], torch.Tensor]
"""The velocity data - noise at pictures and a time from 0, noise, to 1, data."""


def load(name: str) -> ModuleType:
    """A script of the example, as a module of its own name, for other examples have scripts too."""
    spec = importlib.util.spec_from_file_location(name, LESSON / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fetch = load("fetch")
judge = load("judge")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What fetch.py writes where there is no network."""
    folder = tmp_path_factory.mktemp("lesson35")
    for name, digits in fetch.find_digits("sklearn").items():
        fetch.write_tar(folder / f"{name}.tar", digits)
    with torch.random.fork_rng(devices=[]):
        fetch.write_small_t5(folder / "small-t5")
    return folder


def pixel_options(data: Path) -> dict[str, Any]:
    """The options of small.json that make it what it is."""
    return {
        "model": LESSON / "model",
        "model_type": "full",
        "model_init": "random",
        "lora_type": None,
        "lycoris_config": None,
        "pretrained_transformer_model_name_or_path": "tiny.json",
        "pretrained_vae_model_name_or_path": "none",
        "pretrained_t5_model_name_or_path": str(data / "small-t5"),
        "tokenizer_max_length": TEXT_TOKENS,
        "caption_dropout_probability": 0.2,
    }


def write_tiny(folder: Path, data: Path, channels: int = 1, **options: Any) -> Path:
    """A run of six steps with a denoiser of a few thousand parameters."""
    config = write_run(folder, pictures=0, **{**pixel_options(data), **options})
    shape = {**json.loads((LESSON / "small/config.json").read_text()), "in_channels": channels, "out_channels": channels}
    shape |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "num_single_dit_layers": 1}
    (folder / "tiny.json").write_text(json.dumps(shape))
    return config


def digits_of(data: Path) -> dict[str, Any]:
    return {"id": "digits", "type": "webdataset", "source": str(data / "digits.tar"), "caption_strategy": "webdataset", "crop": False}


def weights(folder: Path) -> bytes:
    return (folder / "output/pipeline/transformer/diffusion_pytorch_model.safetensors").read_bytes()


# The shape, the settings, the words.


def test_the_denoiser_has_as_many_parameters_as_the_lessons():
    family = family_of("auraflow")(Models(model_family="auraflow", pretrained_model_name_or_path=str(LESSON / "model")))

    empty = family.empty_denoiser()

    assert sum(parameter.numel() for parameter in empty.parameters()) == LESSON_PARAMETERS


@pytest.mark.parametrize("name", SIZES)
def test_both_sizes_are_understood_and_all_their_settings_have_an_effect(name):
    loaded = read_options(find_config(None, name, None, {}), [])
    family = family_of("auraflow")(loaded.config.models)

    assert not loaded.notes and not family.notes()
    assert loaded.config.data.caption_dropout_probability == 0.2
    assert not family.source.has_vae and family.starts_random and family.source.is_here
    assert family.longest_px >= 32 and 32 % family.alignment_px == 0


def test_the_large_size_learns_as_the_lesson_does():
    config = read_options(find_config(None, "lesson35-mnist", None, {}), []).config

    assert (config.optim.learning_rate, config.optim.lr_scheduler, config.optim.max_grad_norm) == (2e-4, "constant", 1.0)
    assert config.optim.optimizer_config == {"betas": [0.9, 0.99], "weight_decay": 0.0}
    assert (config.training.max_train_steps, config.training.train_batch_size, config.training.use_ema) == (10_000, 128, False)
    assert (config.diffusion.flow_schedule_shift, config.models.tokenizer_max_length) == (1.0, 128)


def test_an_example_without_such_a_size_says_so():
    with pytest.raises(ConfigError, match=r"has no medium\.json"):
        find_config(None, "lesson35-mnist/medium", None, {})


def test_every_digit_is_grey_32_px_square_and_has_a_word_and_a_numeral(data):
    with tarfile.open(data / "digits.tar") as shard:
        members = {entry.name: shard.extractfile(entry).read() for entry in shard}
    pictures, labels = fetch.read_tar(data / "digits.tar")

    captions = {name: text.decode().splitlines() for name, text in members.items() if name.endswith(".txt")}
    assert len(pictures) == len(labels) == len(captions) == 1198 and pictures.shape[1:] == (32, 32)
    assert {tuple(alternatives) for alternatives in captions.values()} == {(fetch.NAMES[digit], str(digit)) for digit in range(10)}
    assert pictures.min() == 0 and pictures.max() > 0.95


def test_where_there_is_a_hub_the_digits_are_those_of_mnist(tmp_path):
    pytest.importorskip("datasets")
    files = {
        "README.md": CARD.encode(),
        "mnist/train-00000-of-00001.parquet": digits_parquet(12, 0),
        "mnist/test-00000-of-00001.parquet": digits_parquet(5, 50),
    }
    with dataset_hub("ylecun/mnist", files) as endpoint:
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        environment = {**os.environ, **quiet, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint}
        line = [sys.executable, str(LESSON / "fetch.py"), "--digits", "mnist", "--t5", "none", "--folder", str(tmp_path)]
        result = subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=120)

    assert result.returncode == 0, result.stderr
    trained, held_out = (fetch.read_tar(tmp_path / f"{name}.tar") for name in ("digits", "held-out"))
    assert trained[1].tolist() == [*range(10), 0, 1] and held_out[1].tolist() == [*range(5)]
    assert trained[0].shape == (12, 32, 32)


def test_no_held_out_digit_is_trained_on(data):
    trained, held_out = (fetch.read_tar(data / f"{name}.tar")[0] for name in ("digits", "held-out"))

    assert {picture.tobytes() for picture in trained}.isdisjoint(picture.tobytes() for picture in held_out)
    assert len(held_out) == 599


def test_the_small_text_encoder_tells_twenty_words_apart(data):
    family = family_of("auraflow")(read_options(find_config(None, "lesson35-mnist/small", None, {}), []).config.models.model_copy(update=t5_at(data)))
    family.check_source()
    words = [*fetch.NAMES, *map(str, range(10)), ""]

    encoders = family.load_text_encoders(CPU, torch.float32)
    prompt = family.encode_text(encoders, words)["prompt"]  # (21, 4, 64)

    assert family.count_tokens(encoders, words) == [2] * 20 + [1]
    distances = torch.cdist(prompt[:, 0], prompt[:, 0]) + 100 * torch.eye(21)
    assert distances.min() > 0.5 * prompt[:, 0].norm(dim=1).mean()


def t5_at(data: Path) -> dict[str, str]:
    return {"pretrained_t5_model_name_or_path": str(data / "small-t5")}


# The sampler.


def lesson_loop(velocity: Velocity, noise: torch.Tensor, steps: int, offset: float) -> torch.Tensor:
    """The lesson's sampler in float64: time s from `offset` (noise) to nearly 1 (data), steps of 1/N along the velocity data - noise."""
    x = noise.double()
    for number in range(steps):
        s = number / steps * (1 - offset) + offset
        x = x + velocity(x, s) / steps
    return x


def euler(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Euler's method in float64 at the times of diffusers: evenly from 0 to 0.999, whatever the number of steps, and then 1."""
    x, times = noise.double(), [*numpy.linspace(0, 0.999, steps), 1.0]
    for s, following in itertools.pairwise(times):
        x = x + velocity(x, s) * (following - s)
    return x


@dataclass(frozen=True)
class Sampled:
    """What the pipeline makes of some noise in so many steps, and the denoiser in float64 that it should have made it with."""

    pictures: torch.Tensor
    velocity: Velocity
    noise: torch.Tensor

    def distance(self, other: torch.Tensor) -> float:
        """The largest difference of a pixel, as a part of how far the sampler moves one."""
        moved = (self.pictures - self.noise).abs().max()
        assert moved > 0.5  # else any two loops agree
        return float((self.pictures - other).abs().max() / moved)


@pytest.fixture
def sample(tmp_path, data) -> Callable[[int], Sampled]:
    write_tiny(tmp_path, data)
    family = family_of("auraflow")(Models(model_family="auraflow", **pixel_only(data, tmp_path / "tiny.json")))
    denoiser, exact = (family.load_denoiser(dtype, 3) for dtype in (torch.float32, torch.float64))
    for network in (denoiser, exact):  # a new network answers nearly nothing
        network.proj_out.weight.data = torch.randn(network.proj_out.weight.shape, generator=torch.Generator().manual_seed(0)).to(network.dtype) * 0.3
    text = family.encode_text(family.load_text_encoders(CPU, torch.float32), ["seven"])
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def velocity(x: torch.Tensor, s: float) -> torch.Tensor:
        time = torch.tensor([1 - s], dtype=torch.float64)
        return -exact(x, encoder_hidden_states=text["prompt"].double(), timestep=time, return_dict=False)[0]

    def render(steps: int) -> Sampled:
        pipeline = family.pipeline(denoiser, family.load_vae(CPU, torch.float32), Diffusion())
        pipeline.set_progress_bar_config(disable=True)
        settings = {"width": 32, "height": 32, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        pictures = pipeline(**family.pipeline_inputs(text, text), latents=noise, **settings).images
        return Sampled(pictures.double(), velocity, noise)

    return render


def test_with_the_lessons_thousand_steps_diffusers_samples_as_the_lesson_does(sample):
    sampled = sample(1000)

    assert sampled.distance(lesson_loop(sampled.velocity, sampled.noise, 1000, offset=0)) < 1e-4
    # The lesson tells its model times up to 0.001 later than they are: less than half of what a byte can tell.
    assert sampled.distance(lesson_loop(sampled.velocity, sampled.noise, 1000, offset=1e-3)) < 0.5 / 255


@pytest.mark.parametrize("steps", [1, 10])
def test_with_fewer_steps_the_sampler_is_eulers_method(sample, steps):
    sampled = sample(steps)

    assert sampled.distance(euler(sampled.velocity, sampled.noise, steps)) < 1e-4


def pixel_only(data: Path, transformer: Path) -> dict[str, Any]:
    places = {"pretrained_model_name_or_path": str(LESSON / "model"), "pretrained_transformer_model_name_or_path": str(transformer), **t5_at(data)}
    return {**places, "model_init": "random", "tokenizer_max_length": TEXT_TOKENS}


# Whole runs.


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A run that was evaluated and looked at."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    held_out = {**digits_of(data), "id": "held-out", "source": str(data / "held-out.tar"), "dataset_type": "eval"}
    looking = {"validation_prompt": "seven", "validation_resolution": "32", "validation_num_inference_steps": 2, "validation_guidance": 1.0}
    write_tiny(folder, data, datasets=[digits_of(data), held_out], **looking, num_eval_images=4, train_batch_size=8)
    assert train_in_process(folder) == 0
    return folder


def test_a_resumed_run_gives_the_same_bytes(tmp_path, finished):
    resumed = Path(shutil.copytree(finished, tmp_path / "resumed"))
    shutil.rmtree(resumed / "output" / "checkpoint-6")
    (resumed / "output/pipeline/transformer/diffusion_pytorch_model.safetensors").unlink()

    assert train_in_process(resumed) == 0

    assert weights(resumed) == weights(finished)


def test_without_a_cache_of_pixels_the_same_is_learned(tmp_path, finished, data):
    again = Path(shutil.copytree(finished, tmp_path / "again", ignore=shutil.ignore_patterns("output", "cache")))

    assert train_in_process(again, "--vae_cache_disable=true") == 0

    assert weights(again) == weights(finished)


def test_pictures_are_grey_and_what_plain_diffusers_makes(finished):
    [path] = (finished / "output/validation_images").glob("step_00006_validation_*_32x32.png")
    pipeline = AuraFlowPipeline.from_pretrained(finished / "output/pipeline", vae=None)
    pipeline.set_progress_bar_config(disable=True)

    settings = {"width": 256, "height": 256, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": TEXT_TOKENS}
    latents = pipeline("seven", generator=torch.Generator().manual_seed(7), output_type="latent", **settings).images

    with Image.open(path) as image:
        assert image.mode == "L" and image.size == (32, 32)
        shown = numpy.asarray(image).astype(float)
    assert numpy.abs((latents[0, 0].numpy() / 2 + 0.5).clip(0, 1) * 255 - shown).max() < 1.01
    assert shown.std() > 10


def test_the_lines_of_the_documentation_render_a_picture(finished, tmp_path, monkeypatch):
    text = (ROOT / "docs/from-scratch.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)

    exec(
        lines.replace("output/lesson35-mnist-small/pipeline", str(finished / "output/pipeline")).replace(
            "num_inference_steps=50", "num_inference_steps=2"
        )
    )

    with Image.open(tmp_path / "seven.png") as image:
        assert image.mode == "L" and image.size == (32, 32)


def test_colour_is_learned_in_three_channels(tmp_path, data):
    add_pictures(tmp_path / "pictures", 4, size=(32, 32))
    looking = {"validation_prompt": "picture", "validation_resolution": "32", "validation_num_inference_steps": 1}
    write_tiny(tmp_path, data, channels=3, max_train_steps=2, **looking)

    assert train_in_process(tmp_path) == 0

    [path] = (tmp_path / "output/validation_images").glob("step_00002_validation_*_32x32.png")
    assert Image.open(path).mode == "RGB"


def test_a_dry_run_says_that_there_is_no_vae_and_whose_text_encoder_it_is(tmp_path, data, capsys):
    write_tiny(tmp_path, data, datasets=[digits_of(data)])

    assert train_in_process(tmp_path, "--dry-run") == 0

    said = " ".join(capsys.readouterr().out.split())
    assert "VAE none: trains on pixels" in said and "small-t5" in said and "sides in steps of 8 px" in said


# The judge.


def test_the_judges_linear_answer_is_exact_for_gaussian_pixels():
    class Zero:
        device = torch.device("cpu")

        def encode_prompt(self, prompts, **settings):
            return torch.zeros(len(prompts), 1, 1), None, None, None

        def transformer(self, noised, **inputs):
            return (torch.zeros_like(noised),)

    numbers = numpy.random.default_rng(0).normal(0.5, 0.25, (400, 32, 32))  # in [-1, 1] of mean 0 and deviation 0.5

    model, linear, average = judge.losses(Zero(), numbers, numpy.zeros(400, int), numbers, 1)

    variance = 0.25
    exact = numpy.mean([variance / ((1 - time) ** 2 * variance + time**2) for time in judge.TIMES])
    assert model == pytest.approx(1 + variance, rel=0.02) and average == pytest.approx(1 + variance, rel=0.02)
    assert linear == pytest.approx(exact, rel=0.02)
