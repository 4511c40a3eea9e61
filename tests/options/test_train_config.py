"""All options together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from simpletuner.options.train_config import SECTIONS, TrainConfig, declared

PACKAGE = Path(__file__).parents[2] / "simpletuner"


def build(**sections):
    parts = {name: section.model_validate({"model_family": "auraflow"} if name == "models" else {}) for name, section in SECTIONS.items()}
    return TrainConfig(**{**parts, **sections})


def test_it_lists_every_option_in_values_that_json_knows():
    flat = build().flat()

    assert flat.keys() == declared().keys()
    assert json.loads(json.dumps(flat)) == flat


def test_an_option_is_found_by_its_key():
    assert build().value("lora_rank") == 16


def test_it_is_frozen():
    with pytest.raises(ValidationError):
        build().optim = SECTIONS["optim"]()


def test_rules_between_sections_hold_however_it_is_made():
    adapters = SECTIONS["adapters"].model_validate({"model_type": "full"})
    memory = SECTIONS["memory"].model_validate({"base_model_precision": "int8-quanto"})

    with pytest.raises(ValidationError, match="quantised weights cannot be trained"):
        build(adapters=adapters, memory=memory)


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("gradient_accumulation_steps", {"training": {"gradient_accumulation_steps": 2}}),
        ("num_processes", {"training": {"num_processes": 2}}),
        ("mixed_precision", {"memory": {"mixed_precision": "fp16"}}),
        ("grad_clip_method", {"optim": {"grad_clip_method": "norm"}}),
        (None, {"optim": {"grad_clip_method": "norm", "max_grad_norm": 0}}),
        (None, {"adapters": {"model_type": "lora"}, "training": {"num_processes": 2}}),
        (None, {}),
    ],
)
def test_gradients_are_let_go_of_where_nothing_waits_for_them(key, sections):
    released = {"adapters": {"model_type": "full"}, "optim": {"optimizer_release_gradients": True, "grad_clip_method": "tensor"}}
    given = {name: SECTIONS[name].model_validate({**released.get(name, {}), **sections.get(name, {})}) for name in {**released, **sections}}

    if key is None:
        assert build(**given).optim.optimizer_release_gradients
    else:
        with pytest.raises(ValidationError, match=f"{key} .* cannot be with optimizer_release_gradients"):
            build(**given)


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({}, "lr_end 5e-06 is above learning_rate, from which lr_scheduler cosine falls"),
        ({"lr_scheduler": "constant"}, None),
        ({"lr_scale": True}, None),
        ({"lr_scale": True, "lr_end": 2e-5}, "above learning_rate, which is 1.6e-05 with 16 pictures a step"),
        ({"lr_scale_sqrt": True}, "above learning_rate, which is 4e-06 with 16 pictures a step"),
    ],
)
def test_a_schedule_that_falls_ends_below_the_rate_that_is_trained_at(optim, said):
    training = SECTIONS["training"].model_validate({"train_batch_size": 4, "gradient_accumulation_steps": 4})
    given = SECTIONS["optim"].model_validate({"lr_scheduler": "cosine", "learning_rate": 1e-6, "lr_end": 5e-6, **optim})

    if said is None:
        assert build(optim=given, training=training).optim == given
    else:
        with pytest.raises(ValidationError, match=said):
            build(optim=given, training=training)


def test_every_option_is_read_by_somebody():
    """An option that nobody reads is a promise that nobody keeps."""
    readers = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if "options" not in path.relative_to(PACKAGE).parts]
    text = "\n".join(readers)

    by_section = {"webhook_config": "webhooks"}  # read through a property of its section
    assert [key for key in declared() if not re.search(rf"\.{by_section.get(key, key)}\b|\.get\(\"{key}\"\)", text)] == []
