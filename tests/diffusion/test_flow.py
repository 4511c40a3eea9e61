from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from simpletuner.diffusion.flow import FlowMatching
from simpletuner.diffusion.times import LogitNormal, Uniform, resolution_shift, shift_time

SHAPE = (3, 4, 5, 6)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    source = generator()
    return torch.randn(SHAPE, generator=source), torch.randn(SHAPE, generator=source)


def test_noised_latents_and_target_equal_a_plain_float64_loop():
    latents, noise = draw()
    time = torch.tensor([0.0, 0.3, 1.0])

    noised = FlowMatching(Uniform(), 1.0).add_noise(latents, noise, time)

    for b in range(SHAPE[0]):
        t = time[b].double().item()
        expected = (1 - t) * latents[b].double() + t * noise[b].double()
        assert torch.allclose(noised.latents[b].double(), expected, atol=1e-6)
        assert torch.equal(noised.target[b], noise[b] - latents[b])
    assert torch.equal(noised.latents[0], latents[0]) and torch.equal(noised.latents[2], noise[2])
    assert torch.equal(noised.time, time)


@pytest.mark.parametrize("steps", [1, 7])
def test_the_samplers_euler_steps_along_our_target_arrive_at_the_data(steps):
    latents, noise = draw()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    scheduler.set_timesteps(steps)
    process = FlowMatching(Uniform(), 1.0)

    sample = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        noised = process.add_noise(latents, noise, sigma.expand(SHAPE[0]))
        assert torch.allclose(sample, noised.latents, atol=1e-5)
        sample = scheduler.step(noised.target, timestep, sample, return_dict=False)[0]

    assert torch.allclose(sample, latents, atol=1e-5)


def test_times_are_drawn_and_then_shifted():
    shifted = FlowMatching(LogitNormal(), 1.73).sample_time(500, tokens=64, generator=generator())

    assert torch.equal(shifted, shift_time(LogitNormal().sample(500, generator()), 1.73))


def test_without_a_shift_of_its_own_the_number_of_tokens_decides():
    process = FlowMatching(LogitNormal(), shift=None)

    small, large = (process.sample_time(500, tokens, generator()) for tokens in (256, 4096))

    assert torch.equal(small, shift_time(LogitNormal().sample(500, generator()), resolution_shift(256)))
    assert (large > small).all()


def test_data_and_noise_are_found_again_in_the_velocity():
    latents, noise = draw()
    process, time = FlowMatching(Uniform(), 1.0), torch.tensor([0.0, 0.3, 1.0])
    noised = process.add_noise(latents, noise, time)

    data, again = process.estimate(noised.latents, noised.target, time)

    assert torch.allclose(data, latents, atol=1e-6) and torch.allclose(again, noise, atol=1e-6)


def test_a_distilled_model_is_told_one_guidance_or_some_of_a_range():
    constant, ranged, nothing = (FlowMatching(Uniform(), 1.0, *told) for told in ((3.5,), (1.0, 4.0), ()))
    latents, noise = draw()

    assert constant.add_noise(latents, noise, torch.zeros(3)).guidance.tolist() == [3.5] * 3
    assert constant.draw_guidance(3, generator()) is None and nothing.draw_guidance(3, generator()) is None
    drawn = ranged.draw_guidance(4000, generator())
    assert 1 <= drawn.min() < 1.01 and 3.99 < drawn.max() <= 4 and abs(drawn.mean() - 2.5) < 0.05


def test_importing_the_process_imports_no_torch():
    code = "import sys, simpletuner.diffusion.flow; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
