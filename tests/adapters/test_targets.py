"""What targets mean on a denoiser."""

from __future__ import annotations

import pytest
from torch import nn

from simpletuner.adapters.targets import match_pattern, match_suffix, names_hint, owner_classes, resolve_class
from simpletuner.errors import ConfigError


class QuantisedLinear(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = QuantisedLinear(2, 2)
        self.norm = nn.LayerNorm(2)


def make_model() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})


def test_only_classes_with_something_to_adapt_are_listed():
    assert owner_classes(make_model()) == {"Block", "QuantisedLinear"}


def test_a_bare_layer_means_its_quantised_relatives_too():
    assert resolve_class("Linear", make_model(), {}, "a file") == ("QuantisedLinear",)


def test_an_alias_means_the_familys_own_class():
    assert resolve_class("FeedForward", make_model(), {"FeedForward": ("Block", "Other")}, "a file") == ("Block",)


def test_a_pattern_is_a_regular_expression_from_the_start_or_a_glob():
    model = make_model()

    assert match_pattern(r"blocks\.1", model, False, "a file") == ["blocks.1.proj"]
    assert len(match_pattern("*.proj", model, True, "a file")) == 2
    with pytest.raises(ConfigError, match="no regular expression"):
        match_pattern("*.proj", model, False, "a file")


def test_a_suffix_ends_at_a_dot():
    assert match_suffix("to_q", ["a.to_q", "a.add_to_q", "to_q", "to_q.b"]) == ["a.to_q", "to_q"]


def test_the_hint_folds_block_numbers_and_begins_with_the_nearest():
    names = [f"blocks.{number}.attn.{part}" for number in range(40) for part in ("to_q", "to_k")]

    assert names_hint("blocks.N.attn.to_kk", names) == "There are: blocks.N.attn.to_k, blocks.N.attn.to_q."
