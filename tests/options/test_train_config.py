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


def test_every_option_is_read_by_somebody():
    """An option that nobody reads is a promise that nobody keeps."""
    readers = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if "options" not in path.relative_to(PACKAGE).parts]
    text = "\n".join(readers)

    assert [key for key in declared() if not re.search(rf"\.{key}\b", text)] == []
