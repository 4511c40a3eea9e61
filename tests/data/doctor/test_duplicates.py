"""Groups of equal and nearly equal images."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import simpletuner
from simpletuner.data.doctor.duplicates import BITS, CROWD, near_pairs, same_groups, twin_pairs
from simpletuner.data.doctor.looks import look_at

PLAIN = bytes(48)


def brute(hashes, colours):
    return [
        (a, b)
        for a in range(len(hashes))
        for b in range(a + 1, len(hashes))
        if bin(hashes[a] ^ hashes[b]).count("1") <= BITS and np.abs(np.frombuffer(colours[a], np.uint8).astype(int) - list(colours[b])).mean() <= 12
    ]


def flip(hash, bits):
    for bit in bits:
        hash ^= 1 << bit
    return hash


def mirrored_twins(looks):
    return twin_pairs([look.hash for look in looks], [look.colours for look in looks], [(look.mirror_hash, look.mirror_colours) for look in looks])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 63), max_size=8), st.sampled_from([0, 10, 60])), max_size=40),
    st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4),
)
def test_the_same_pairs_are_found_as_by_comparing_each_with_each(changes, bases):
    hashes = [flip(bases[base], bits) for base, bits, _ in changes]
    colours = [bytes([paint]) * 48 for _, _, paint in changes]

    assert near_pairs(hashes, colours) == brute(hashes, colours)


def test_handwritten_digits_of_many_hands_are_no_duplicates():
    files = sorted((Path(simpletuner.__file__).parent / "examples/digits/images").rglob("*.png"))
    looks = [look_at(path.read_bytes(), path.name, decodes=False) for path in files]

    assert len(files) > 100
    assert near_pairs([look.hash for look in looks], [look.colours for look in looks]) == []
    assert mirrored_twins(looks) == []


def test_same_hash_with_other_colours_is_no_duplicate():
    assert near_pairs([5, 5, 5], [bytes(48), bytes([255]) * 48, bytes([3]) * 48]) == [(0, 2)]


def test_a_mirror_image_is_a_twin_and_its_own_mirror_image_is_none():
    paint = bytes(48)

    one, other, third = 0xFFFF, 0xFFFF << 24, 0xFFFF << 48
    assert twin_pairs([one, other, third], [paint] * 3, [(other, paint), (one, paint), (third, paint)]) == [(0, 1, True)]
    assert twin_pairs([one, one], [paint] * 2, [(one, paint)] * 2) == [(0, 1, False)]  # alike as they are, which says more


def test_equal_digests_are_grouped_and_unread_files_are_not():
    assert same_groups(["a", "b", "a", "", "", "c", "b", "a"]) == [[0, 2, 7], [1, 6]]


def test_time_does_not_grow_with_the_square():
    generator = np.random.default_rng(0)

    def seconds(count):
        hashes = [int(each) for each in generator.integers(0, 2**63, count)]
        begin = time.process_time()
        near_pairs(hashes, [PLAIN] * count)
        return time.process_time() - begin

    seconds(1000)

    assert seconds(40_000) < 40 * max(seconds(5_000), 0.01)  # the square would be 64 times


def test_thousands_of_blank_pictures_end():
    pairs = near_pairs([0] * 3000, [PLAIN] * 3000)

    assert {a for pair in pairs for a in pair} == set(range(3000))
    assert len(pairs) < 3000 * CROWD * 2
