"""For tests of what only a card can show: they skip by themselves where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
"""A file's `pytestmark`."""


def cuda() -> torch.device:
    return torch.device("cuda", 0)


def without_package(call: Callable[[], Any]) -> Any:
    """What a call gives; the test is skipped if it wants a package, or a card, that is not here."""
    from simpletuner.errors import ConfigError

    try:
        return call()
    except ConfigError as error:
        pytest.skip(error.message)
