"""Options with which a run fits a card."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.options.train_config import TrainConfig
from simpletuner.training.fit import Proposal, _Search, fit, with_settings
from simpletuner.training.plan import CUDA_BYTES, plan_run
from simpletuner.training.plan_pictures import LargestBatch
from simpletuner.types import Size
from tests.training.families import TINY
from tests.training.test_plan import config_of

SIZE = TINY["flux"].size


def proposal(tmp_path, room: int, kind: str = "lora", count: int = 2, **options) -> Proposal:
    config = config_of("flux", tmp_path, kind, gradient_checkpointing=False, **options)
    return fit(config, LargestBatch(SIZE, count, 0, ()), CUDA_BYTES + room)


def each_change_lowers_the_peak(found: Proposal, config: TrainConfig, count: int) -> bool:
    def peak(changes) -> int:
        settings = {key: value for change in changes for key, value in change.settings.items()}
        return plan_run(with_settings(config, settings), SIZE, count).peak_vram_bytes

    without = [peak([other for other in found.changes if other is not change]) for change in found.changes]
    return all(one > found.plan.peak_vram_bytes for one in without) and found.plan.peak_vram_bytes < found.before.peak_vram_bytes


def test_a_run_that_fits_is_left_alone(tmp_path):
    found = proposal(tmp_path, 10**9)

    assert found.fits and found.changes == () and found.time_factor == 1


def test_what_costs_least_time_is_proposed_and_the_plan_is_of_that(tmp_path):
    config = config_of("flux", tmp_path, "lora", gradient_checkpointing=False)
    whole = plan_run(config, SIZE, 2)
    one_by_one = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    halved = plan_run(with_settings(config, one_by_one), SIZE, 1).phase("step").vram_bytes
    others = max(phase.vram_bytes for phase in whole.phases if phase.name not in ("step", "save"))
    assert others < halved < whole.phase("step").vram_bytes

    found = proposal(tmp_path, halved)

    assert found.fits and found.plan.peak_vram_bytes <= halved
    assert [dict(change.settings) for change in found.changes] == [one_by_one]
    assert found.plan.batch_size == 1


def test_where_nothing_fits_the_smallest_is_given(tmp_path):
    found = proposal(tmp_path, 1, count=1)
    settings = {key for change in found.changes for key in change.settings}

    assert not found.fits
    assert {"gradient_checkpointing", "base_model_precision"} <= settings
    assert "vae_enable_tiling" not in settings  # pictures as small as these are no larger than a tile
    assert each_change_lowers_the_peak(found, config_of("flux", tmp_path, "lora", gradient_checkpointing=False), 1)


def settings_of(found: Proposal) -> dict[str, Any]:
    return {key: value for change in found.changes for key, value in change.settings.items()}


def test_full_training_in_float32_is_offered_no_bf16_and_no_quantised_base(tmp_path):
    settings = settings_of(proposal(tmp_path, 1, "full", count=1, use_ema=True))

    assert settings["optimizer"] == "bnb-adamw8bit" and settings["ema_device"] == "cpu"
    assert not {"base_model_precision", "blocks_to_swap"} & settings.keys()


def test_what_full_training_gives_up_comes_in_the_order_of_its_cost(tmp_path):
    config = config_of("flux", tmp_path, "full", mixed_precision="bf16", optimizer="torch-adamw")
    released = {"optimizer_release_gradients": True, "grad_clip_method": "tensor"}
    orders = [released, {"optimizer": "ao-adamw8bit"}]
    peaks = [plan_run(with_settings(config, settings), SIZE, 1).peak_vram_bytes for settings in orders]
    assert peaks == sorted(set(peaks), reverse=True)

    found = [fit(config, LargestBatch(SIZE, 1, 0, ()), CUDA_BYTES + peak) for peak in peaks]

    assert [settings_of(one) for one in found] == orders
    assert [one.plan.peak_vram_bytes for one in found] == peaks and all(one.fits and one.time_factor == 1 for one in found)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"num_processes": 2}, {"optimizer": "prodigy"}], ids=lambda one: next(iter(one))
)
def test_gradients_are_released_where_nothing_forbids_it_alone(tmp_path, options):
    config = config_of("flux", tmp_path, "full", mixed_precision="bf16", **options)

    settings = settings_of(fit(config, LargestBatch(SIZE, 1, 0, ()), CUDA_BYTES + 1))

    assert ("optimizer_release_gradients" in settings) == ("optimizer" in options)  # another optimizer can
    assert next(with_settings(config, settings).problems(), None) is None


def test_what_comes_nearest_is_never_above_the_run_as_it_is(tmp_path):
    best = {"optimizer": "ao-adamw8bit", "optimizer_release_gradients": True, "grad_clip_method": "tensor"}
    config = config_of("flux", tmp_path, "full", mixed_precision="bf16", gradient_checkpointing_backend="offload", **best)

    found = fit(config, LargestBatch(SIZE, 1, 0, ()), CUDA_BYTES + 1)

    assert not found.fits and found.plan.peak_vram_bytes <= found.before.peak_vram_bytes
    assert not {"optimizer", "optimizer_release_gradients"} & settings_of(found).keys()
    assert not found.changes or found.plan.peak_vram_bytes < found.before.peak_vram_bytes


def test_a_base_in_8_bits_is_offered_4_and_inputs_in_main_memory(tmp_path):
    config = config_of("flux", tmp_path, "lora", base_model_precision="int8-quanto", gradient_checkpointing_offload_bytes=0)
    search = _Search(config, LargestBatch(SIZE, 1, 0, ()))

    offered = [change.settings for changes in search.combinations for change in changes]

    assert {"base_model_precision": "nf4-bnb"} in offered and {"gradient_checkpointing_backend": "offload"} in offered


def test_fewer_pictures_at_a_time_are_proposed_before_tiles_where_encoding_takes_most(tmp_path):
    size = Size(64, 64)
    config = config_of("flux", tmp_path, "lora", vae_batch_size=4)
    whole = plan_run(config, size, 1)
    assert whole.peak_vram_bytes == whole.phase("vae").vram_bytes

    found = fit(config, LargestBatch(size, 1, 0, ()), CUDA_BYTES + max(phase.vram_bytes for phase in whole.phases if phase.name != "vae"))

    assert [dict(change.settings) for change in found.changes][-1].keys() == {"vae_batch_size"}
    assert found.fits and found.time_factor == 1
