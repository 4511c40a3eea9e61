"""A denoiser with an adapter on it that is no longer as it started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.adapters.adapter import Adapter, Targets, kind_of
from simpletuner.models.family import ModelFamily
from simpletuner.options.adapters import Adapters
from simpletuner.plugins import load

LOKR = {"algo": "lokr", "linear_dim": 10000, "factor": 4, "dropout": 0.1, "apply_preset": {"target_module": ["Attention", "FeedForward"]}}


def adapt(denoiser: nn.Module, built: ModelFamily, kind: str, folder: Path, lycoris: Mapping[str, Any] = LOKR) -> Adapter:
    """Put an adapter on a denoiser and move every number of it at random, the same each time.

    Args:
        kind: its lora_type; a standard one has dropout.
        folder: where `lycoris`, the content of its lycoris_config, is written.
    """
    settings = folder / "lycoris.json"
    settings.write_text(json.dumps(lycoris))
    options = Adapters(lora_type=kind, lora_rank=4, lora_dropout=0.3 if kind == "standard" else 0, lycoris_config=settings)
    targets = Targets(built.class_aliases, built.lora_targets, built.denoiser_folder)
    adapter = load("simpletuner.adapters.kinds", kind_of(options), Adapter)(options, targets)
    torch.manual_seed(0)
    adapter.attach(denoiser)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapter
