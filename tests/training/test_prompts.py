"""Sizes of pictures, as users write them."""

from __future__ import annotations

import pytest

from simpletuner.errors import ConfigError
from simpletuner.training.prompts import parse_size
from simpletuner.types import Size

SIZES = {"1024x768": Size(1024, 768), "1024": Size(1024, 1024), "1.0": Size(1024, 1024), "70x64": Size(64, 64), "5": Size(64, 64)}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_size_is_edges_or_megapixels_and_fits_the_model(text, size):
    assert parse_size(text, 64) == size


@pytest.mark.parametrize("text", ["0", "0x64", "64x0", "64 by 64", "-64", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not a size|has no pixels"):
        parse_size(text, 64)
