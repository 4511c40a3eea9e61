"""Options with which a run fits a card."""

from __future__ import annotations

from simpletuner.training.fit import Proposal, fit, with_settings
from simpletuner.training.plan import CUDA_BYTES, plan_run
from simpletuner.training.plan_pictures import LargestBatch
from tests.training.families import TINY
from tests.training.test_plan import config_of

SIZE = TINY["flux"].size


def proposal(tmp_path, room: int, kind: str = "lora", count: int = 2, **options) -> Proposal:
    config = config_of("flux", tmp_path, kind, gradient_checkpointing=False, **options)
    return fit(config, LargestBatch(SIZE, count, 0, ()), CUDA_BYTES + room)


def test_a_run_that_fits_is_left_alone(tmp_path):
    found = proposal(tmp_path, 10**9)

    assert found.fits and found.changes == () and found.time_factor == 1


def test_what_costs_least_time_is_proposed_and_the_plan_is_of_that(tmp_path):
    config = config_of("flux", tmp_path, "lora", gradient_checkpointing=False)
    whole = plan_run(config, SIZE, 2)
    one_by_one = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    halved = plan_run(with_settings(config, one_by_one), SIZE, 1).phase("step").vram_bytes
    others = max(phase.vram_bytes for phase in whole.phases if phase.name != "step")
    assert others < halved < whole.phase("step").vram_bytes

    found = proposal(tmp_path, halved)

    assert found.fits and found.plan.peak_vram_bytes <= halved
    assert [dict(change.settings) for change in found.changes] == [one_by_one]
    assert found.plan.batch_size == 1


def test_where_nothing_fits_the_smallest_is_given(tmp_path):
    found = proposal(tmp_path, 1, count=1)
    settings = {key for change in found.changes for key in change.settings}

    assert not found.fits
    assert {"gradient_checkpointing", "base_model_precision", "vae_enable_tiling", "text_encoder_1_precision"} <= settings


def test_full_training_is_offered_no_quantised_base(tmp_path):
    found = proposal(tmp_path, 1, "full", count=1, use_ema=True)
    settings = {key: value for change in found.changes for key, value in change.settings.items()}

    assert settings["optimizer"] == "bnb-adamw8bit" and settings["ema_device"] == "cpu"
    assert not {"base_model_precision", "blocks_to_swap"} & settings.keys()
