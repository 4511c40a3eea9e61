"""The loss of a micro-step equals a plain float64 computation, and its randomness depends only on where the run is."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.loss import loss_function
from simpletuner.diffusion.times import LogitNormal
from simpletuner.randomness import seed_from
from simpletuner.training.step import Step
from simpletuner.types import Batch, Crop, Geometry, Sample, Size

SIZE = Size(32, 32)
SAMPLES = tuple(Sample("data", name, "digest", Geometry(SIZE, SIZE, Crop(0, 0, 32, 32)), ("caption",)) for name in ("a.png", "b.png"))
SCALE = 0.5


class OneLayer(torch.nn.Module):
    """A denoiser small enough to write out: w * x + t."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7))


class Family:
    """The two verbs of a family that a step calls, for `OneLayer`."""

    def scale_latents(self, raw):
        return raw * SCALE

    def tokens(self, latents):
        return 16

    def predict(self, denoiser, noised, batch):
        return denoiser.w * noised.latents + noised.time.view(-1, 1, 1, 1)


class Silent:
    """An adapter without dropouts."""

    def set_strength(self, strength):
        pass

    def train(self, mode):
        pass


def step(**changes) -> Step:
    parts = {
        "family": Family(),
        "denoiser": OneLayer(),
        "adapter": Silent(),
        "process": FlowMatching(LogitNormal(), shift=1.73),
        "loss": loss_function("l2", 0.1),
        "device": torch.device("cpu"),
        "seed": 5,
        "rank": 0,
        "draws_latents": True,
    }
    return Step(**{**parts, **changes})


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    return Batch(SAMPLES, ("caption", "caption"), {"mean": mean, "std": std.abs() * 0.1}, {})


def reference(data: Batch, number: int, micro: int, draws: bool) -> list[float]:
    """The same in float64, loop by loop, from the draws in the order that `Step.noise` documents."""
    generator = torch.Generator().manual_seed(seed_from("noise", 5, number, 0, micro))
    mean, std = data.latents["mean"].double(), data.latents["std"].double()
    raw = mean + std * torch.randn(mean.shape, generator=generator).double() if draws else mean
    t = torch.sigmoid(torch.randn(2, generator=generator)).double()
    t = 1.73 * t / (1 + 0.73 * t)
    noise = torch.randn(mean.shape, generator=generator).double()
    losses = []
    for x, n, time in zip(raw * SCALE, noise, t):
        noisy = (1 - time) * x + time * n
        losses.append(((0.7 * noisy + time - (n - x)) ** 2).mean().item())
    return losses


@pytest.mark.parametrize("draws", [True, False], ids=["fresh latents", "mean latents"])
def test_the_loss_equals_a_float64_reference(draws):
    losses = step(draws_latents=draws).losses(batch(), 3, 1)

    assert losses.tolist() == pytest.approx(reference(batch(), 3, 1, draws), rel=1e-5)


def test_the_same_place_in_a_run_draws_the_same_whatever_happened_before():
    first = step().losses(batch(), 3, 1)
    torch.rand(100)

    assert torch.equal(step().losses(batch(), 3, 1), first)


@pytest.mark.parametrize("change", [{"seed": 6}, {"rank": 1}])
def test_another_seed_or_process_draws_something_else(change):
    assert not torch.equal(step(**change).losses(batch(), 3, 1), step().losses(batch(), 3, 1))


@pytest.mark.parametrize(("number", "micro"), [(4, 1), (3, 0)])
def test_another_step_or_micro_step_draws_something_else(number, micro):
    assert not torch.equal(step().losses(batch(), number, micro), step().losses(batch(), 3, 1))


def test_dropout_draws_depend_only_on_the_place_in_the_run():
    class Dropping(Family):
        def predict(self, denoiser, noised, batch):
            return torch.nn.functional.dropout(noised.latents, 0.5)

    run = partial(step, family=Dropping())

    assert torch.equal(run().losses(batch(), 1, 0), run().losses(batch(), 1, 0))
    assert not torch.equal(run().losses(batch(), 1, 0), run().losses(batch(), 2, 0))
