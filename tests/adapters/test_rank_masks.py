"""T-LoRA: the ranks that are active at a time, each sample's own, and the files and lines that others read."""

from __future__ import annotations

import pytest
import torch
from lycoris import clear_timestep_mask, compute_timestep_mask, create_lycoris_from_weights, set_timestep_mask

from simpletuner.adapters.adapter import ADAPTER_FILE
from simpletuner.adapters.effect import FileEffect
from simpletuner.adapters.ranks import active_ranks, rule_of
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.targets import layout_of
from simpletuner.adapters.weights import metadata_of
from simpletuner.errors import ConfigError

TLORA = {
    "algo": "tlora",
    "linear_dim": 8,
    "linear_alpha": 4,
    "tlora_min_rank": 2,
    "tlora_alpha": 2.0,
    "apply_preset": {"target_module": ["Attention"]},
}
MEASURED = {
    0: (16, 16, 16, 16),
    100: (14, 14, 13, 15),
    250: (12, 13, 9, 13),
    500: (8, 10, 4, 11),
    750: (4, 7, 1, 8),
    900: (2, 5, 1, 5),
    999: (1, 4, 1, 1),
    1000: (1, 4, 1, 1),
}
"""Timestep of 1000 to the active ones of 16 ranks, with least rank 1, 4, 1, 1 and power 1, 1, 2, 0.5: as measured elsewhere."""
TIMES = torch.tensor([0.1, 0.7])


@pytest.fixture(autouse=True)
def no_mask_of_the_librarys_own():
    yield
    clear_timestep_mask()


@pytest.fixture
def trained(make_denoiser, make_adapter):
    """A function that gives a denoiser and an adapter on it that has learned something."""

    def make(dtype=torch.float32, **changes):
        denoiser, adapter = make_denoiser(dtype), make_adapter({**TLORA, **changes})
        adapter.attach(denoiser)
        torch.manual_seed(3)
        for parameter in adapter.parameters().values():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        return denoiser, adapter

    return make


@pytest.mark.parametrize(("timestep", "counts"), MEASURED.items())
def test_active_ranks_are_those_measured_elsewhere(timestep, counts):
    time = torch.tensor([timestep / 1000])

    found = [int(active_ranks(time, 16, least, power)) for least, power in ((1, 1.0), (4, 1.0), (1, 2.0), (1, 0.5))]

    assert found == list(counts)


@pytest.mark.parametrize(("least", "power"), [(1, 1.0), (4, 1.0), (1, 2.0), (3, 0.5)])
def test_active_ranks_are_those_of_the_library_at_every_step(least, power):
    steps = range(1000)

    ours = active_ranks(torch.tensor([step / 1000 for step in steps]), 16, least, power)

    theirs = [int(compute_timestep_mask(step, 1000, 16, least, power).sum()) for step in steps]
    # Where the count is whole but for the last digit of float64, the library may take one rank less.
    assert sum(int(one) != other for one, other in zip(ours, theirs)) <= 3
    assert max(abs(int(one) - other) for one, other in zip(ours, theirs)) <= 1


def test_untrained_it_changes_nothing_at_any_time(make_denoiser, make_adapter, run):
    for dtype in (torch.float32, torch.bfloat16):
        denoiser, adapter = make_denoiser(dtype), make_adapter(TLORA)
        before = run(denoiser)
        adapter.attach(denoiser)

        adapter.at_time(TIMES)

        assert torch.equal(run(denoiser), before)


@torch.no_grad()
def test_each_sample_of_a_batch_has_the_ranks_of_its_own_time(trained, run):
    denoiser, adapter = trained()
    adapter.at_time(TIMES)
    together = run(denoiser)

    for row, time in enumerate(TIMES):
        adapter.at_time(time.reshape(1))
        assert torch.allclose(run(denoiser)[row], together[row], atol=1e-5)
    adapter.at_time(torch.tensor([0.7]))
    assert not torch.allclose(run(denoiser)[0], together[0], atol=1e-2)


@torch.no_grad()
def test_a_module_adds_what_its_formula_says_in_float64(trained):
    _, adapter = trained()
    module = adapter._network.loras[0]
    x = torch.randn(2, 5, module.shape[1], generator=torch.Generator().manual_seed(1))
    adapter.at_time(TIMES)

    ours = module.bypass_forward_diff(x)

    q, p, now, q0, p0, start = (
        value.double()
        for value in (module.q_layer.weight, module.p_layer.weight, module.lambda_layer, module.base_q, module.base_p, module.base_lambda)
    )
    for row, time in enumerate(TIMES.tolist()):
        mask = (torch.arange(8) < int((1 - time) ** 2 * 6) + 2).double()
        delta = p @ torch.diag(now[0] * mask) @ q - p0 @ torch.diag(start[0] * mask) @ q0
        theirs = 0.5 * x[row].double() @ delta.T
        assert float((ours[row] - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_ranks_that_are_asleep_learn_nothing(trained, run):
    denoiser, adapter = trained()
    adapter.at_time(torch.tensor([0.99, 0.999]))  # two ranks

    run(denoiser).square().mean().backward()

    gradients = {name: value.grad for name, value in adapter.parameters().items() if name.endswith("lambda_layer")}
    assert gradients and all(bool(value[:, :2].any()) and not value[:, 2:].any() for value in gradients.values())


@torch.no_grad()
def test_the_library_renders_with_the_saved_file_and_its_mask_as_training_did(trained, make_denoiser, run, tmp_path):
    denoiser, adapter = trained()
    adapter.save(tmp_path, {})
    fresh = make_denoiser()
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / ADAPTER_FILE), fresh)
    network.apply_to()

    for time in (0.1, 0.7):
        adapter.at_time(torch.tensor([time]))
        set_timestep_mask(compute_timestep_mask(time * 1000, 1000, 8, 2, 2.0))
        assert torch.allclose(run(fresh), run(denoiser), rtol=1e-3, atol=1e-3)
    clear_timestep_mask()
    assert not torch.allclose(run(fresh), run(denoiser), rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_a_file_alone_is_masked_as_training_was_by_what_its_header_says(trained, make_denoiser, run, tmp_path):
    denoiser, adapter = trained()
    adapter.save(tmp_path, {})
    fresh = make_denoiser()
    changes = read_changes(tmp_path, layout_of(fresh, "transformer", None), "AuraFlow")
    effect = FileEffect(changes, rule_of(changes, metadata_of(tmp_path)))
    effect.attach(fresh)

    for time in (TIMES, TIMES[:1], TIMES[1:]):
        adapter.at_time(time)
        effect.at_time(time)
        assert torch.allclose(run(fresh), run(denoiser), rtol=1e-3, atol=1e-3)
    effect.at_time(torch.zeros(1))
    assert not torch.allclose(run(fresh), run(denoiser), rtol=1e-3, atol=1e-2)


def test_a_header_without_the_settings_of_a_t_lora_tells_no_rule(trained, make_denoiser, tmp_path):
    _, adapter = trained()
    adapter.save(tmp_path, {})
    changes = read_changes(tmp_path, layout_of(make_denoiser(), "transformer", None), "AuraFlow")

    for said in ({}, {"lycoris_config": "{"}, {"lycoris_config": '{"algo": "nothing"}'}):
        assert rule_of(changes, said) is None


@torch.no_grad()
def test_a_saved_adapter_is_read_back_as_it_was_with_its_own_alpha(trained, make_denoiser, make_adapter, run, tmp_path):
    denoiser, adapter = trained()
    adapter.save(tmp_path, {})
    fresh = make_denoiser()
    again = make_adapter({**TLORA, "linear_alpha": 8})
    again.attach(fresh)

    again.load(tmp_path)

    for one in (adapter, again):
        one.at_time(TIMES)
    assert torch.equal(run(fresh), run(denoiser))
    saved, read = (one._in_file(one._state()) for one in (adapter, again))
    assert all(torch.equal(value, read[name]) for name, value in saved.items())


def test_the_snippet_masks_as_training_did_and_says_why(trained):
    _, adapter = trained()

    text = adapter.snippet("AuraFlowPipeline", "a/b", {"prompt": "a cat"}, "output")

    compile(text, "snippet", "exec")
    assert "set_timestep_mask(compute_timestep_mask(float(timestep), pipeline.scheduler.config.num_train_timesteps, 8, 2, 2))" in text
    assert "another adapter" in text and "bypass_mode" not in text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tlora_min_rank": 9}, "from 1 to linear_dim 8"),
        ({"tlora_alpha": 0}, "more than 0"),
        ({"sig_type": "last"}, "must be 'principal'"),
        ({"use_data_init": False}, "cannot load"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make_adapter, wrong, said):
    with pytest.raises(ConfigError, match=said):
        make_adapter({**TLORA, **wrong})
