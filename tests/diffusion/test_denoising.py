from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from simpletuner.diffusion.denoising import Denoising, Offset, Perturbation, biased, restricted

SHAPE = (5, 4, 6, 8)
STEPS = torch.tensor([0, 1, 400, 700, 999])
SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler(**options) -> DDPMScheduler:
    return DDPMScheduler(**{**SDXL, **options})


def process(source: DDPMScheduler, **options) -> Denoising:
    return Denoising(tuple(source.alphas_cumprod.tolist()), **{"prediction": "epsilon", **options})


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    source = generator()
    return torch.randn(SHAPE, generator=source), torch.randn(SHAPE, generator=source)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noised_latents_and_targets_equal_those_of_diffusers(prediction, zero_snr):
    source = scheduler(rescale_betas_zero_snr=zero_snr)
    latents, noise = draw()

    noised = process(source, prediction=prediction).add_noise(latents, noise, STEPS / 1000)

    targets = {"epsilon": noise, "v_prediction": source.get_velocity(latents, noise, STEPS), "sample": latents}
    assert relative(noised.latents, source.add_noise(latents, noise, STEPS)) < 1e-6
    assert relative(noised.target, targets[prediction]) < 1e-6


def test_noised_latents_equal_a_plain_float64_loop():
    source = scheduler()
    latents, noise = draw()
    noised = process(source, prediction="v_prediction").add_noise(latents, noise, STEPS / 1000)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    for b, step in enumerate(STEPS):
        a = alphas[step]
        assert torch.allclose(noised.latents[b].double(), a.sqrt() * latents[b].double() + (1 - a).sqrt() * noise[b].double(), atol=1e-5)
        assert torch.allclose(noised.target[b].double(), a.sqrt() * noise[b].double() - (1 - a).sqrt() * latents[b].double(), atol=1e-5)


@pytest.mark.parametrize(("prediction", "denominator"), [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_weights_equal_those_of_the_scripts_of_diffusers(prediction, denominator):
    source = scheduler()
    latents, noise = draw()

    ours = process(source, prediction=prediction, snr_gamma=5.0).add_noise(latents, noise, STEPS / 1000).weight

    snr = compute_snr(source, STEPS)
    theirs = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + denominator)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_where_the_schedule_ends_in_pure_noise(prediction):
    latents, noise = draw()

    weight = process(scheduler(rescale_betas_zero_snr=True), prediction=prediction, snr_gamma=5.0).add_noise(latents, noise, STEPS / 1000).weight

    assert torch.isfinite(weight).all() and (weight >= 0).all()


def test_snr_weight_multiplies_the_weights():
    latents, noise = draw()
    plain, doubled = (process(scheduler(), snr_gamma=5.0, snr_weight=weight).add_noise(latents, noise, STEPS / 1000).weight for weight in (1.0, 2.0))

    assert torch.equal(doubled, 2 * plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_data_and_noise_are_found_again_in_a_perfect_answer(prediction):
    latents, noise = draw()
    made = process(scheduler(), prediction=prediction)
    noised = made.add_noise(latents, noise, STEPS / 1000)

    data, again = made.estimate(noised.latents.double(), noised.target, noised.time)

    signal, spread = (part.double().view(-1, 1, 1, 1) for part in made.mix(noised.time))
    # What float32 inputs lose is multiplied by what little there is of the one in the other.
    assert ((data - latents).abs() * signal).max() < 1e-6
    assert ((again - noise).abs() * spread).max() < 1e-6


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diff2flow_measures_the_velocity_that_an_answer_amounts_to(prediction, zero_snr):
    if zero_snr and prediction == "epsilon":
        return
    source = scheduler(rescale_betas_zero_snr=zero_snr)
    latents, noise = draw()
    answer = torch.randn(SHAPE, generator=generator(9))
    made = process(source, prediction=prediction, learns_flow=True, snr_gamma=5.0)

    noised = made.add_noise(latents, noise, STEPS / 1000)
    ours = made.answer(answer, noised)

    assert torch.equal(noised.target, noise - latents)
    for b, step in enumerate(STEPS):
        a = source.alphas_cumprod[step].double()
        x, p, signal, spread = noised.latents[b].double(), answer[b].double(), a.sqrt(), (1 - a).sqrt()
        if prediction == "epsilon":
            data, eps = (x - spread * p) / signal, p
        elif prediction == "v_prediction":
            data, eps = signal * x - spread * p, spread * x + signal * p
        else:
            data, eps = p, (x - signal * p) / spread
        assert relative(ours[b], eps - data) < 1e-6
        snr = a / (1 - a)
        assert float(noised.weight[b]) == pytest.approx(float(min(snr, 5.0) / (1 + snr.sqrt()) ** 2), rel=1e-5)


def test_diff2flow_has_no_error_where_the_answer_is_perfect():
    latents, noise = draw()
    plain = process(scheduler()).add_noise(latents, noise, STEPS / 1000)
    made = process(scheduler(), learns_flow=True)

    noised = made.add_noise(latents, noise, STEPS / 1000)

    assert torch.allclose(made.answer(plain.target, noised), noised.target, atol=1e-4)


def test_a_refiner_trains_the_less_noisy_share_and_its_base_the_rest():
    assert restricted(10, 0.2, False) == (1.0, 1.0, *[0.0] * 8)
    assert restricted(10, 0.2, True) == (0.0, 0.0, *[1.0] * 8)
    drawn = process(scheduler(), weights=restricted(1000, 0.2, False)).sample_time(64, 1, generator())
    assert drawn.max() < 0.2


def test_without_gamma_no_sample_is_weighted():
    latents, noise = draw()

    assert process(scheduler()).add_noise(latents, noise, STEPS / 1000).weight is None


def test_times_are_steps_and_every_step_comes_up():
    drawn = process(scheduler(), is_stratified=False).sample_time(40_000, 1, generator())

    steps = (drawn * 1000).round().long()
    assert torch.equal(steps.float() / 1000, drawn)
    assert set(steps.tolist()) == set(range(1000))


def test_a_stratified_batch_takes_one_step_of_each_part_the_noisiest_first():
    for seed in range(50):
        steps = (process(scheduler()).sample_time(4, 1, generator(seed)) * 1000).round()

        assert [int(step) // 250 for step in steps] == [3, 2, 1, 0]


def test_stratified_draws_are_uniform_over_many_batches():
    source = generator()
    steps = torch.cat([process(scheduler()).sample_time(8, 1, source) for _ in range(5000)])

    counts = torch.histc(steps, bins=10, min=0, max=1)
    assert (counts / counts.sum() - 0.1).abs().max() < 0.005


@pytest.mark.parametrize("is_stratified", [True, False])
def test_a_bias_trains_its_steps_so_much_more_often(is_stratified):
    weights = biased(1000, "later", 0.25, 3.0, 0, 1000)
    source = generator()
    steps = torch.cat([process(scheduler(), weights=weights, is_stratified=is_stratified).sample_time(4, 1, source) for _ in range(5000)])

    assert abs(float((steps >= 0.75).float().mean()) - 0.75 / 1.5) < 0.01


def test_biases_name_the_steps_that_users_mean():
    assert biased(10, "earlier", 0.2, 4.0, 0, 0) == (4.0, 4.0, *[1.0] * 8)
    assert biased(10, "later", 0.2, 4.0, 0, 0) == (*[1.0] * 8, 4.0, 4.0)
    assert biased(10, "range", 0.2, 4.0, 3, 5) == (*[1.0] * 3, 4.0, 4.0, *[1.0] * 5)
    assert biased(10, "none", 0.2, 4.0, 3, 5) is None


def test_offset_noise_moves_the_mean_of_a_channel_by_its_strength():
    shape = (64, 4, 32, 32)
    plain, _ = process(scheduler()).draw_noise(shape, 0, generator())
    moved, _ = process(scheduler(), offset=Offset(0.5, 1.0)).draw_noise(shape, 0, generator())

    assert abs(float(plain.mean((2, 3)).std()) - 1 / 32) < 0.01
    assert abs(float(moved.mean((2, 3)).std()) - 0.5) < 0.05
    assert torch.allclose(moved - moved.mean((2, 3), keepdim=True), plain - plain.mean((2, 3), keepdim=True), atol=1e-5)


def test_offset_noise_comes_as_often_as_it_should():
    source = generator()
    some = process(scheduler(), offset=Offset(10.0, 0.25))

    hit = sum(float(some.draw_noise((1, 4, 8, 8), 0, source)[0].mean((2, 3)).abs().max()) > 1 for _ in range(1000))

    assert 200 < hit < 300


def test_a_perturbed_input_keeps_its_target_and_fades_out():
    latents, _ = draw()
    perturbed = process(scheduler(), perturbation=Perturbation(0.1, until_step=100))
    noise, mixed = perturbed.draw_noise(SHAPE, 0, generator())
    _, late = perturbed.draw_noise(SHAPE, 100, generator())

    noised = perturbed.add_noise(latents, noise, STEPS / 1000, mixed)

    assert torch.equal(noised.target, noise) and torch.equal(late, noise)
    assert abs(float((mixed - noise).std()) - 0.1) < 0.01
    assert relative(noised.latents, scheduler().add_noise(latents, mixed, STEPS)) < 1e-6
    assert Perturbation(0.1, 100).at(50) == pytest.approx(0.05) and Perturbation(0.1, 0).at(10**6) == 0.1
