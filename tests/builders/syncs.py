"""Something else in place of the disk's sync, for what a test itself writes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest


def replace_fsync(patch: pytest.MonkeyPatch, fsync: Callable[[int], object]) -> None:
    """Let this test's files be synced by another function.

    A store seals its shard when it is collected. Those that earlier tests left behind are collected first, or their syncs would count here.
    """
    gc.collect()
    patch.setattr(os, "fsync", fsync)
