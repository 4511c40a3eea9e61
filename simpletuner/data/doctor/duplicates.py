"""Which images are the same, and which nearly: groups by digest, and by a perceptual hash without comparing each with each.

Two hashes that differ in at most 6 of 64 bits agree in at least 2 of 8 bands of 8 bits. So for every 2 of the bands the images
are sorted by them, and only neighbours that agree in both are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

BITS = 6
"""Bits of 64 in which near duplicates may differ."""
BANDS = 8
COLOUR_LEVELS = 12.0
"""Mean difference of small colours, of 255, that near duplicates may have."""
SHAPE_SHARE = 0.15
"""The same with brightness taken out, as a share of the contrast. Measured: copies that are scaled, compressed, cut by a fiftieth or
8% lighter stay under 0.1; two handwritten fives on white, which share the hash, have 0.19."""
FLAT_LEVELS = 2.0
"""Contrast below which there is no shape to compare."""
CROWD = 64
"""Neighbours that an image is compared with at most for each 2 of the bands, so that thousands of blank pictures cost no square."""
CHUNK = 4096
"""Pairs that are compared at once."""
POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)

Numbers = NDArray[np.int64]


def same_groups(digests: Sequence[str]) -> list[list[int]]:
    """Positions of equal digests, in groups of two and more; an empty digest is nobody's equal."""
    groups: dict[str, list[int]] = {}
    for position, digest in enumerate(digests):
        if digest:
            groups.setdefault(digest, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def near_pairs(hashes: Sequence[int], colours: Sequence[bytes]) -> list[tuple[int, int]]:
    """Positions of images that look alike, each pair once, the smaller first.

    Args:
        hashes: 64 bits each.
        colours: of all the same length.
    """
    count = len(hashes)
    if count < 2:
        return []
    bits = np.array(hashes, dtype=">u8").view(np.uint8).reshape(count, BANDS)  # band 0 is the highest byte
    found = [pairs for first, second in combinations(range(BANDS), 2) for pairs in neighbours(bits, first, second)]
    codes = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))
    paint = np.frombuffer(b"".join(colours), dtype=np.uint8).reshape(count, -1, 3)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(codes), CHUNK):
        left, right = np.divmod(codes[start : start + CHUNK], count)
        is_alike = look_alike(paint[left], paint[right])
        pairs += zip(left[is_alike].tolist(), right[is_alike].tolist())
    return pairs


def twin_pairs(hashes: Sequence[int], colours: Sequence[bytes], mirrored: Sequence[tuple[int, bytes]]) -> list[tuple[int, int, bool]]:
    """Positions of images that look alike, each pair once, the smaller first; and whether only one's mirror image looks like the other.

    Args:
        hashes, colours: as for `near_pairs`.
        mirrored: hash and colours of each one's mirror image.
    """
    count = len(hashes)
    # The second half are the mirror images: a pair across the halves are two images of which one is mirrored, or one like itself.
    pairs = near_pairs([*hashes, *(one[0] for one in mirrored)], [*colours, *(one[1] for one in mirrored)])
    found = {(a, b): False for a, b in pairs if b < count}
    for a, b in pairs:
        if a < count <= b and a != b - count:
            found.setdefault((min(a, b - count), max(a, b - count)), True)
    return [(*pair, is_mirrored) for pair, is_mirrored in found.items()]


def neighbours(bits: NDArray[np.uint8], first: int, second: int) -> Iterator[Numbers]:
    """Pairs (as a * count + b) of near hashes among those that agree in two bands: runs of equal keys, compared at growing distance."""
    count = len(bits)
    key = bits[:, first].astype(np.int64) << 8 | bits[:, second]
    # Within a run the rest of the hash decides the order, so that in a crowd the most alike lie together.
    order = np.lexsort((*(bits[:, band] for band in reversed(range(BANDS))), key))
    key = key[order]
    at = np.arange(count)
    for distance in range(1, CROWD + 1):
        at = at[at + distance < count]
        at = at[key[at] == key[at + distance]]  # a run is contiguous: who has no neighbour at this distance has none further on
        if not len(at):
            return
        left, right = order[at], order[at + distance]
        is_near = POPCOUNT[bits[left] ^ bits[right]].sum(axis=1, dtype=np.int64) <= BITS
        left, right = left[is_near], right[is_near]
        yield np.minimum(left, right) * count + np.maximum(left, right)


def look_alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether small pictures have nearly the same colours and shapes.

    Args:
        one, other: (pairs, pixels, 3).
    """
    left, right = one.astype(np.float32), other.astype(np.float32)
    is_as_light = np.abs(left - right).mean(axis=(1, 2)) <= COLOUR_LEVELS
    left -= left.mean(axis=1, keepdims=True)
    right -= right.mean(axis=1, keepdims=True)
    contrast = np.maximum(np.abs(left).mean(axis=(1, 2)), np.abs(right).mean(axis=(1, 2)))
    allowed = SHAPE_SHARE * np.maximum(contrast, FLAT_LEVELS / SHAPE_SHARE)
    answer: NDArray[np.bool_] = is_as_light & (np.abs(left - right).mean(axis=(1, 2)) <= allowed)
    return answer
