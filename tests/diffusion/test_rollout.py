"""Rollouts take latents where samplers of diffusers take them, and the terms of ReflexFlow equal their formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.diffusion.denoising import Denoising
from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.loss import loss_function
from simpletuner.diffusion.rollout import Chance, Reflex, ScheduledSampling, roll_out
from simpletuner.diffusion.times import Uniform
from simpletuner.types import Noised

SHAPE = (3, 2, 4, 5)
SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = DDIMScheduler(**SDXL, clip_sample=False)
FLOW = FlowMatching(Uniform(), 1.0)
PROCESSES = {
    "flow": FLOW,
    **{name: Denoising(tuple(DDIM.alphas_cumprod.tolist()), name) for name in ("epsilon", "v_prediction", "sample")},
}


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int = 1) -> torch.Tensor:
    return torch.randn(SHAPE, generator=generator(seed))


def model(noised: Noised) -> torch.Tensor:
    """A denoiser that bends: its answer hangs on latents and time."""
    t = noised.time.view(-1, 1, 1, 1)
    return torch.tanh(1.5 * noised.latents) + t * noised.latents.cos()


def steps(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).T / 1000


def sampling(**changes) -> ScheduledSampling:
    chance = Chance(1.0, 0.0, 0.5, 0, 0, "linear")
    return ScheduledSampling(**{"most_steps": 8, "strategy": "uniform", "chance": chance, "order": 2, "reflex": None, **changes})


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_model_without_errors_arrives_where_mixing_in_noise_does(name, order):
    process, latents, noise = PROCESSES[name], draw(1), draw(2)
    way = steps([704, 703, 702], [300, 300, 299], [50, 50, 50])

    def perfect(noised):
        return process.add_noise(latents, noise, noised.time).target

    arrived = roll_out(process, perfect, process.add_noise(latents, noise, way[0]), way, order)

    assert torch.allclose(arrived, process.add_noise(latents, noise, way[-1]).latents, atol=2e-5)


def test_the_first_order_is_eulers_method_of_diffusers_in_flow_matching():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.704, 0.703, 0.702, 0.701])
    expected = draw()
    for timestep in scheduler.timesteps[:3]:
        answer = model(Noised(expected, expected, (timestep / 1000).expand(3)))
        expected = scheduler.step(answer, timestep, expected, return_dict=False)[0]

    way = steps(*[[704, 703, 702, 701]] * 3)
    found = roll_out(FLOW, model, Noised(draw(), draw(), way[0]), way, 1)

    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_the_first_order_is_ddim_of_diffusers_in_steps_of_one(name):
    scheduler = DDIMScheduler(**SDXL, clip_sample=False, prediction_type=name)
    scheduler.set_timesteps(1000)
    expected = draw()
    for step in (504, 503, 502):
        expected = scheduler.step(model(Noised(expected, expected, torch.full((3,), step / 1000))), step, expected, return_dict=False)[0]

    way = steps(*[[504, 503, 502, 501]] * 3)
    found = roll_out(PROCESSES[name], model, Noised(draw(), draw(), way[0]), way, 1)

    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_the_second_order_is_dpm_solver_of_diffusers(name):
    places = [704, 604, 504, 404, 4]
    scheduler = DPMSolverMultistepScheduler(**SDXL, prediction_type=name, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=False)
    scheduler.set_timesteps(timesteps=places)
    expected = draw()
    for step in scheduler.timesteps[:3]:
        expected = scheduler.step(model(Noised(expected, expected, (step / 1000).expand(3))), step, expected, return_dict=False)[0]

    way = steps(*[[float(place) for place in places[:4]]] * 3)
    found = roll_out(PROCESSES[name], model, Noised(draw(), draw(), way[0]), way, 2)

    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_second_order_is_nearer_to_many_small_steps_than_the_first():
    coarse, fine = steps(*[[800, 700, 600, 500]] * 3), torch.linspace(0.8, 0.5, 3001)[:, None].expand(-1, 3)
    exact = roll_out(FLOW, model, Noised(draw(), draw(), fine[0]), fine, 1)

    first, second = (float((roll_out(FLOW, model, Noised(draw(), draw(), coarse[0]), coarse, order) - exact).abs().max()) for order in (1, 2))

    assert second < first / 2


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_short_way_is_the_same_beside_a_long_one(name, order):
    process = PROCESSES[name]
    together = steps([510, 509, 508, 507, 506], [302, 302, 302, 301, 300], [999, 998, 997, 996, 995])
    alone = steps([302, 301, 300])
    # A tensor of another size may be summed in another order, so a denoiser without sums.
    beside = roll_out(process, model, Noised(draw(), draw(), together[0]), together, order)[1]
    one = roll_out(process, model, Noised(draw()[1:2], draw()[1:2], alone[0]), alone, order)[0]

    assert torch.allclose(beside, one, atol=1e-6)


def test_from_pure_noise_and_to_the_picture_itself_there_are_numbers():
    zero = Denoising(tuple(DDIMScheduler(**SDXL, rescale_betas_zero_snr=True).alphas_cumprod.tolist()), "v_prediction")
    for process, way in ((FLOW, steps([1000, 999, 998], [2, 1, 0], [0, 0, 0])), (zero, steps([999, 998, 997], [2, 1, 0], [0, 0, 0]))):
        for order in (1, 2):
            assert torch.isfinite(roll_out(process, model, Noised(draw(), draw(), way[0]), way, order)).all()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 10**6))
def test_ways_fall_in_steps_of_a_thousandth_and_end_at_the_time_that_is_trained(times, most, seed):
    time = torch.tensor(times)

    way = sampling(most_steps=most).way(time, 0, FLOW, generator(seed))

    if way is None:
        return
    assert torch.equal(way[-1], time) and way.max() <= 1
    falls = way[:-1].double() - way[1:].double()
    assert len(way) - 1 <= most and falls.min() >= 0 and falls.max() < 0.00101
    assert (falls.sum(1) > 0).all()
    assert all((row > 0).tolist() == sorted((row > 0).tolist()) for row in falls.T)  # who waits, waits at the start


def test_ways_of_discrete_steps_stay_within_the_schedule():
    time = torch.tensor([999, 997, 0]) / 1000

    ways = [sampling(most_steps=20).way(time, 0, PROCESSES["epsilon"], generator(seed)) for seed in range(30)]

    found = [(way * 1000).round() for way in ways if way is not None]
    assert all(float((way - (way * 1000).round() / 1000).abs().max()) < 1e-6 for way in ways if way is not None)
    assert max(float(way[0, 0]) for way in found) == 999 and max(float(way[0, 1]) for way in found) == 999


def test_rollouts_come_as_often_as_their_chance_and_are_drawn_as_their_strategy_says():
    time = torch.full((4000,), 0.5)
    half = sampling(chance=Chance(0.5, 0, 0, 0, 0, "linear"), most_steps=1).way(time, 0, FLOW, generator())
    never = sampling(chance=Chance(0.0, 0, 0, 0, 0, "linear")).way(time, 0, FLOW, generator())

    means = {
        strategy: float((sampling(strategy=strategy).way(time, 0, FLOW, generator())[0] - 0.5).mean() * 1000)
        for strategy in ("biased_early", "uniform", "biased_late")
    }

    assert never is None and abs(float((half[0] > half[1]).float().mean()) - 0.25) < 0.03  # of lengths 0 and 1, half of the half
    assert abs(means["uniform"] - 4) < 0.15 and means["biased_early"] < 3 and means["biased_late"] > 5


def test_the_chance_rises_from_its_start_along_its_ramp():
    linear, cosine = (Chance(0.9, 0.1, 0.5, 100, 50, shape) for shape in ("linear", "cosine"))

    assert [linear.at(step) for step in (49, 50, 100, 150, 1000)] == pytest.approx([0, 0.1, 0.3, 0.5, 0.5])
    assert [cosine.at(step) for step in (50, 75, 100, 150)] == pytest.approx([0.1, 0.1 + 0.4 * 0.14644661, 0.3, 0.5])
    assert [Chance(0.9, 0.1, 0.5, 0, 50, "linear").at(step) for step in (49, 50)] == [0, 0.9]


@pytest.mark.parametrize("masked", [False, True])
def test_reflexflow_equals_its_formula_in_float64(masked):
    latents, noise, prediction, time = draw(1), draw(2), draw(3), torch.tensor([0.2, 0.7, 0.9])
    drift = 0.1 * draw(4) * torch.tensor([1.0, 1.0, 0.0]).view(-1, 1, 1, 1)
    path = FLOW.add_noise(latents, noise, time)
    noised = Noised(path.latents + drift, path.target, time, drift=drift)
    mask = (torch.arange(5) < 3).float().expand(3, 1, 4, 5) if masked else None

    ours = Reflex(alpha=0.5, direction=10.0, compensation=2.0)(loss_function("l2", 0.1), prediction, noised, mask)

    weight = mask.double() if masked else torch.ones(3, 1, 4, 5, dtype=torch.float64)
    for b in range(3):
        x, p, target, gone = latents[b].double(), prediction[b].double(), path.target[b].double(), drift[b].double()
        squared = (p - target) ** 2 * weight[b]
        if b == 2:
            assert float(ours[b]) == pytest.approx(float(squared.mean()), rel=1e-6)
            continue
        compensated = (squared * (1 + 0.5 * gone.abs() / gone.abs().max())).mean()
        ahead, away = p * weight[b], ((path.latents[b].double() + gone) - x) * weight[b]
        rectified = 2 - 2 * (ahead * away).sum() / ahead.norm() / away.norm()
        assert float(ours[b]) == pytest.approx(float(2 * compensated + 10 * rectified), rel=1e-6)


def test_a_prediction_right_towards_the_picture_costs_nothing_in_direction():
    latents, noise, time = draw(1), draw(2), torch.tensor([0.2, 0.7, 0.9])
    drift = 0.1 * draw(4)
    path = FLOW.add_noise(latents, noise, time)
    noised = Noised(path.latents + drift, path.target, time, drift=drift)

    ours = Reflex(alpha=0.0, direction=1.0, compensation=0.0)(loss_function("l2", 0.1), 3 * (noised.latents - latents), noised, None)

    assert float(ours.max()) < 1e-6
