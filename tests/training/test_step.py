"""The loss of a micro-step equals a plain float64 computation, and its randomness depends only on where the run is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from simpletuner.diffusion.denoising import Denoising
from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.loss import loss_function
from simpletuner.diffusion.rollout import Chance, Reflex, ScheduledSampling
from simpletuner.diffusion.times import LogitNormal, Uniform
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

    def at_time(self, time):
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


ALPHAS = tuple(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.tolist())
OBJECTIVES = {
    "flow": FlowMatching(Uniform(), 3.0),
    "epsilon": Denoising(ALPHAS, "epsilon"),
    "epsilon, min-SNR": Denoising(ALPHAS, "epsilon", snr_gamma=5.0),
    "velocity, min-SNR": Denoising(ALPHAS, "v_prediction", snr_gamma=5.0),
    "data, min-SNR": Denoising(ALPHAS, "sample", snr_gamma=5.0),
    "Diff2Flow": Denoising(ALPHAS, "epsilon", learns_flow=True),
    "Diff2Flow, min-SNR": Denoising(ALPHAS, "v_prediction", snr_gamma=5.0, learns_flow=True),
}


class Adding(Silent):
    """An adapter that adds as much to what the denoiser answers, at every place."""

    def __init__(self):
        self.strength, self.times = 1.0, []

    def set_strength(self, strength):
        self.strength = strength

    def at_time(self, time):
        self.times.append(time)


class Adapted(Family):
    def __init__(self, adapter, amount=0.3):
        self.adapter, self.amount = adapter, amount

    def predict(self, denoiser, noised, batch):
        return super().predict(denoiser, noised, batch) + self.adapter.strength * self.amount


def regularisation() -> Batch:
    return replace(batch(), samples=tuple(replace(sample, is_regularisation=True) for sample in SAMPLES))


@pytest.mark.parametrize("kind", ["l2", "huber"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_regularisation_pictures_cost_what_the_adapter_changes_in_every_objective(objective, kind):
    process, adapter = OBJECTIVES[objective], Adding()
    made = step(process=process, adapter=adapter, family=Adapted(adapter), loss=loss_function(kind, 0.1, "snr", process.sigma))

    losses = made.losses(regularisation(), 3, 1)

    noised = made.noise(regularisation(), 3, 1)
    for b, loss in enumerate(losses.tolist()):
        signal, spread = (float(part[b]) for part in process.mix(noised.time.double()))
        d = 0.3
        if "Diff2Flow" in objective:
            d = 0.3 * (1 + spread / signal) if process.prediction == "epsilon" else 0.3 * (signal + spread)
        c = 0.9 / (1 + spread / signal) ** 2 + 0.1
        expected = d**2 if kind == "l2" else 2 * c * ((d**2 + c**2) ** 0.5 - c)
        assert loss == pytest.approx(expected * (1.0 if noised.weight is None else float(noised.weight[b])), rel=1e-4)
    assert adapter.strength == 1.0


def test_a_regularisation_picture_costs_nothing_where_the_adapter_changes_nothing():
    for process in OBJECTIVES.values():
        adapter = Adding()
        made = step(process=process, adapter=adapter, family=Adapted(adapter, 0.0))

        assert made.losses(regularisation(), 3, 1).tolist() == [0, 0]


ROLLING = ScheduledSampling(6, "uniform", Chance(0.7, 0, 0, 0, 0, "linear"), 2, Reflex(1.0, 10.0, 1.0))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_rollout_depends_only_on_the_place_in_the_run_and_leaves_everything_else_as_drawn(objective):
    parts = {"process": OBJECTIVES[objective], "denoiser": OneLayer()}
    rolling = step(**parts, scheduled_sampling=replace(ROLLING, reflex=ROLLING.reflex if objective == "flow" else None))

    places = [(number, micro) for number in range(4) for micro in range(2)]
    first = [rolling.noise(batch(), *place) for place in places]
    again = [rolling.noise(batch(), *place) for place in reversed(places)][::-1]
    plain = [step(**parts).noise(batch(), *place) for place in places]

    assert all(torch.equal(one.latents, other.latents) for one, other in zip(first, again))
    assert all(torch.equal(one.time, other.time) and torch.equal(one.target, other.target) for one, other in zip(first, plain))
    drifts = [noised.drift for noised in first if noised.drift is not None]
    assert len(drifts) >= 4 and all(drift.abs().max() > 0 for drift in drifts)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(first, plain) if one.drift is None)
    assert all(torch.isfinite(rolling.losses(batch(), *place)).all() for place in places)


def test_another_process_rolls_out_other_samples():
    ways = [[step(scheduled_sampling=ROLLING, rank=rank)._way(torch.full((2,), 0.5), batch(), number, 0) for number in range(8)] for rank in (0, 1)]

    assert any(mine is None or other is None or mine.shape != other.shape or not torch.equal(mine, other) for mine, other in zip(*ways))


def test_nothing_is_learned_through_a_rollout_and_none_is_made_of_regularisation_pictures():
    rolling = step(scheduled_sampling=replace(ROLLING, chance=Chance(1.0, 0, 0, 0, 0, "linear")))

    noised = [rolling.noise(batch(), number, 0) for number in range(4)]

    assert not any(one.latents.requires_grad for one in noised) and any(one.drift is not None for one in noised)
    assert all(rolling.noise(regularisation(), number, 0).drift is None for number in range(4))


def test_the_loss_of_a_rolled_out_batch_equals_a_float64_reference():
    rolling = step(scheduled_sampling=replace(ROLLING, order=1, chance=Chance(1.0, 0, 0, 0, 0, "linear"), reflex=None), draws_latents=False)
    noised = rolling.noise(batch(), 3, 1)
    way = rolling._way(noised.time, batch(), 3, 1)

    losses = rolling.losses(batch(), 3, 1)

    generator = torch.Generator().manual_seed(seed_from("noise", 5, 3, 0, 1))
    torch.randn(2, generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator).double()
    for b in range(2):
        x, times = batch().latents["mean"][b].double() * SCALE, way[:, b].double().tolist()
        rolled = (1 - times[0]) * x + times[0] * noise[b]
        for now, then in pairwise(times):
            rolled = rolled + (then - now) * (0.7 * rolled + now)
        expected = ((0.7 * rolled + times[-1] - (noise[b] - x)) ** 2).mean().item()
        assert losses[b].item() == pytest.approx(expected, rel=1e-6)


def test_the_adapter_is_told_the_time_before_every_call_of_the_denoiser():
    adapter = Adding()
    rolling = step(adapter=adapter, family=Adapted(adapter), scheduled_sampling=replace(ROLLING, chance=Chance(1.0, 0, 0, 0, 0, "linear")))

    rolling.losses(batch(), 3, 1)

    noised = rolling.noise(batch(), 3, 1)
    way = rolling._way(noised.time, batch(), 3, 1)
    assert torch.equal(torch.stack(adapter.times[: len(way)]), way)
