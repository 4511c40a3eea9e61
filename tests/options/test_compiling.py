"""How blocks are compiled goes together with what saves memory, or is refused."""

from __future__ import annotations

import pytest

from simpletuner.errors import ConfigError
from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting

BUDGET = {"dynamo_backend": "inductor", "activation_memory_budget": 0.5}
RECORDED = {"dynamo_backend": "inductor", "dynamo_mode": "reduce-overhead"}


def load(**values):
    settings = [Setting(key, value, "config.json") for key, value in {"model_family": "auraflow", "model_type": "lora", **values}.items()]
    return load_config(settings, lambda name, flavour, location: {}).config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (BUDGET, ("activation_memory_budget", "gradient_checkpointing")),
        ({**BUDGET, "gradient_checkpointing": False, "lora_dropout": 0.1}, ("activation_memory_budget", "lora_dropout")),
        (RECORDED, ("dynamo_mode", "gradient_checkpointing")),
        ({**RECORDED, "gradient_checkpointing": False, "blocks_to_swap": 2}, ("dynamo_mode", "blocks_to_swap")),
    ],
)
def test_what_does_not_go_together_is_refused_by_both_names(values, named):
    with pytest.raises(ConfigError) as raised:
        load(**values)

    assert all(name in str(raised.value) for name in named)


@pytest.mark.parametrize("values", [BUDGET, RECORDED])
def test_without_checkpointing_both_are_taken_and_without_a_compiler_nothing_is_refused(values):
    assert load(**values, gradient_checkpointing=False)
    assert load(**{**values, "dynamo_backend": "no"})


@pytest.mark.parametrize("budget", [0, 1.1])
def test_a_budget_is_a_share_above_nothing(budget):
    with pytest.raises(ConfigError, match="activation_memory_budget"):
        load(**{**BUDGET, "gradient_checkpointing": False, "activation_memory_budget": budget})
