"""Stateless randomness: a seed is a function of what it is for, so nothing needs saving to resume."""

from __future__ import annotations

import hashlib


def seed_from(*parts: int | str) -> int:
    """Make a 63-bit seed out of named parts, e.g. seed_from("noise", seed, step, rank).

    The same parts give the same number on every machine and in every Python.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
