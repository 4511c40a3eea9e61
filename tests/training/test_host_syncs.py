"""Between two log points the host asks the device nothing: one that cannot answer trains every family.

PyTorch's meta device stands for the accelerator. It computes shapes alone, so that every question for a number (`.item()`, `.tolist()`, truth
of a tensor, a boolean index, a copy to main memory) is one to a device that has none: here it is written down, and answered with ones.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.adapters.adapter import Adapter, Targets, kind_of
from simpletuner.models.offline import config_here
from simpletuner.optim.build import build_optimizer, build_schedule
from simpletuner.options.adapters import Adapters
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.optim import Optim
from simpletuner.options.training import Training
from simpletuner.plugins import load
from simpletuner.training.ema import build_ema
from simpletuner.training.objective import loss_of, scheduled_sampling_of
from simpletuner.training.pace import Pace
from simpletuner.training.plan_step import shaped_batch
from simpletuner.training.recovery import Recovery
from simpletuner.training.state import TrainState
from simpletuner.training.step import Step
from simpletuner.training.trainer import Trainer
from simpletuner.types import Batch
from tests.training.families import TINY, family

DEVICE = torch.device("meta")
aten = torch.ops.aten
ANSWERS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
METER = "meter.py"
"""Asks for the figures of the step before: on CUDA of pinned memory, once an event has passed."""


class Questions(TorchDispatchMode):
    """Writes down where the device is asked for numbers, or made to wait for some, and answers with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        first = arguments[0] if arguments else None
        if isinstance(first, Tensor):
            if function in ANSWERS and first.device == DEVICE:
                self._write_down(function)
                return self._answer(function, first)
            if function is aten._to_copy.default:
                there = torch.device(named.get("device") or first.device)
                if first.device == DEVICE and there.type == "cpu":
                    self._write_down(function)
                    return torch.ones(first.shape, dtype=named.get("dtype") or first.dtype)
                if first.device.type == "cpu" and there == DEVICE and not named.get("non_blocking"):
                    self._write_down(function)
            if function is aten.copy_.default and {first.device.type, arguments[1].device.type} == {"cpu", "meta"}:
                self._write_down(function)
                return first.fill_(1) if first.device.type == "cpu" else first
            if function in (aten.index.Tensor, aten.index_put_.default) and any(one is not None and one.dtype == torch.bool for one in arguments[1]):
                self._write_down(function)
        return function(*arguments, **named)

    @staticmethod
    def _answer(function: Any, asked: Tensor) -> Any:
        if function is aten._local_scalar_dense.default:
            return torch.ones((), dtype=asked.dtype).item()
        if function is aten.equal.default:
            return True
        return torch.zeros(0, asked.ndim, dtype=torch.long, device=DEVICE) if function is aten.nonzero.default else asked.new_empty(0)

    def _write_down(self, what: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename and frame.filename != __file__]
        self.asked.append(f"{what} in {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}")


class Constants(TorchFunctionMode):
    """Sees what dispatch does not: numbers of Python that are made on the device, which copies them and waits."""

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self._questions = questions

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        makes = function in (torch.tensor, torch.as_tensor) and torch.device(named.get("device") or "cpu") == DEVICE
        if makes or (function is Tensor.new_tensor and arguments[0].device == DEVICE):
            self._questions._write_down(function)
        return function(*arguments, **named)


@contextmanager
def questions() -> Iterator[Questions]:
    found = Questions()
    with found, Constants(found):
        yield found


class Batches:
    """A stream of one batch over and over, made ready as the loader's threads do it."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def iterate(self, position: int, *, stride: int, count: int, make_ready: Any) -> Iterator[Batch]:
        yield from (make_ready(self._batch, number) for number, _ in enumerate(repeat(None, count)))

    def locate(self, position: int) -> tuple[int, int]:
        return 0, position


def lokr(folder: Path) -> Adapters:
    settings = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 4, "dropout": 0.1}
    file = folder / "lycoris_config.json"
    file.write_text(json.dumps({**settings, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}))
    return Adapters(lora_type="lycoris", lycoris_config=file)


KINDS = {"lokr": lokr, "lora": lambda folder: Adapters(lora_rank=4, lora_dropout=0.3), "all weights": lambda folder: Adapters(model_type="full")}


def trainer(name: str, adapters: Adapters, *, optim: Any = None, training: Any = None, diffusion: Any = None, pictures: Any = None) -> Trainer:
    """A run on the device that cannot answer."""
    built, training = family(name), Training(**(training or {}))
    diffusion = Diffusion(**{**({"refiner_training": True} if name == "sdxl-refiner" else {}), **(diffusion or {})})
    denoiser = built.load_denoiser(torch.float32, 0).to(DEVICE).train()
    targets = Targets(built.class_aliases, built.lora_targets, built.denoiser_folder, built.original_layout)
    adapter: Any = load("simpletuner.adapters.kinds", kind_of(adapters), Adapter)(adapters, targets)
    adapter.attach(denoiser)
    adapter.to(DEVICE)
    process = built.process(diffusion)
    sampling = scheduled_sampling_of(diffusion, built.objective)
    step = Step(built, denoiser, adapter, process, loss_of(diffusion, process), DEVICE, 5, 0, draws_latents=True, scheduled_sampling=sampling)
    shapes = built.text_shapes([config_here(built.source.part(part)) for part in built.parts if part.startswith("text_encoder")])
    batch = shaped_batch(built, shapes, TINY[name].size, 2, references=1 if built.takes_references else 0)
    parameters, optim = adapter.parameters(), Optim(**(optim or {}))
    steps = Pace(total_steps=4, accumulation=training.gradient_accumulation_steps)
    nothing: Any = SimpleNamespace(log=lambda step, values: None, advance=lambda count, text: None, exit_code=None)
    return Trainer(
        step=step,
        adapter=adapter,
        optimizer=build_optimizer(optim, parameters),
        schedule=build_schedule(optim, 4),
        optim=optim,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=build_ema(training, parameters) if training.use_ema else None,
        recovery=Recovery({}, pytest.fail),
        loader=Batches(replace(batch, **(pictures or {}))),
        pace=steps,
        state=TrainState(step=0, position=0, epoch=0, data_digest="", assistant=None),
        accelerator=Accelerator(cpu=True),
        checkpoints=nothing,
        metadata={},
        write_extras=pytest.fail,
        validator=nothing,
        evaluator=nothing,
        probes=iter(()),
        trackers=nothing,
        console=nothing,
        stop=nothing,
        autocast=nullcontext,
    )


def asked_by(run: Trainer) -> list[str]:
    """What the device is asked in the second step, but for the figures of the one before."""
    batches, bar = run.batches(), SimpleNamespace(advance=lambda count, text: None)
    with questions() as found:
        run.advance(batches, bar)
        found.asked.clear()
        run.advance(batches, bar)
    others = [one for one in found.asked if f" in {METER}:" not in one]
    assert len(found.asked) == len(others) + 1  # the device is really watched
    return others


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in TINY for kind in KINDS if name == "auraflow" or kind == "lokr"])
def test_a_step_asks_the_device_nothing(tmp_path, name, kind):
    assert asked_by(trainer(name, KINDS[kind](tmp_path))) == []


SETTINGS = {
    "clipped by norm": {"optim": {"max_grad_norm": 1.0}},
    "clipped by value": {"optim": {"max_grad_norm": 0.1, "grad_clip_method": "value"}},
    "averaged, accumulated": {"training": {"use_ema": True, "gradient_accumulation_steps": 3}},
    "masked": {"pictures": {"mask": torch.ones(2, 1, 6, 4)}},
}
OF_DENOISING = {
    "min-SNR": {"snr_gamma": 5.0},
    "Huber by SNR": {"loss_type": "huber", "huber_schedule": "snr"},
    "noise that is offset and perturbed": {"offset_noise": True, "noise_offset": 0.1, "input_perturbation": 0.1},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_no_option_of_the_step_asks_the_device(tmp_path, options):
    assert asked_by(trainer("auraflow", lokr(tmp_path), **options)) == []


@pytest.mark.parametrize("options", OF_DENOISING.values(), ids=OF_DENOISING)
def test_no_option_of_the_objective_asks_the_device(tmp_path, options):
    assert asked_by(trainer("sdxl", lokr(tmp_path), diffusion=options)) == []


def test_a_rollout_asks_the_device_nothing(tmp_path):
    rolled = {"scheduled_sampling_max_step_offset": 3, "scheduled_sampling_probability": 1.0}

    assert asked_by(trainer("auraflow", lokr(tmp_path), diffusion=rolled)) == []


@pytest.mark.parametrize(("name", "questions"), [("torch-adamw", 0), ("torch-adam", 0), ("torch-sgd", 0), ("adamw_bf16", 1)])
def test_the_scaler_of_fp16_asks_nothing_with_fused_optimizers_and_once_with_others(name, questions):
    class Asked(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            self.count += function is aten._local_scalar_dense.default
            return function(*arguments, **(named or {}))

    parameter, scaler = torch.nn.Parameter(torch.ones(4)), torch.amp.GradScaler("cpu")
    optimizer = build_optimizer(Optim(optimizer=name), {"weight": parameter})
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)

    with Asked() as asked:
        scaler.step(optimizer)
        scaler.update()

    assert asked.count == questions


QUESTIONS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool(x.sum() > 0),
    "a boolean index": lambda x: x[x > 0],
    "a boolean index that is written to": lambda x: x.__setitem__(x > 0, x[0]),
    "where": lambda x: torch.where(x > 0),
    "a copy to main memory": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "a copy that is waited for": lambda x: torch.ones(3).to(DEVICE),
    "a number of Python": lambda x: torch.tensor([1.0], device=DEVICE),
}


@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_is_noticed(ask):
    with questions() as found, suppress(NotImplementedError):  # what a boolean index gives has no shape
        ask(torch.ones(3).to(DEVICE, non_blocking=True))

    assert found.asked


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells when the host waits")
@pytest.mark.parametrize("name", ["auraflow", "sdxl", "flux"])
def test_cuda_finds_no_wait_either(tmp_path, name, monkeypatch):
    monkeypatch.setattr("tests.training.test_host_syncs.DEVICE", torch.device("cuda"))
    run = trainer(name, lokr(tmp_path))
    batches, bar = run.batches(), SimpleNamespace(advance=lambda count, text: None)
    run.advance(batches, bar)

    torch.cuda.set_sync_debug_mode("error")
    try:
        run.advance(batches, bar)
        run.advance(batches, bar)
    finally:
        torch.cuda.set_sync_debug_mode("default")
