"""Digest, hash and colours of an image."""

from __future__ import annotations

import pytest
from PIL import Image, ImageEnhance

from simpletuner.data.doctor.looks import look_at
from simpletuner.data.images import decode_rgb
from tests.builders.demonstration import encoded, landscape


def distance(a: bytes, b: bytes) -> int:
    return bin(look_at(a, "a", decodes=False).hash ^ look_at(b, "b", decodes=False).hash).count("1")


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_that_was_scaled_compressed_or_made_lighter_has_nearly_the_same_hash(seed):
    image = landscape(900, 600, seed)
    plain = encoded(image)

    assert distance(plain, encoded(image, "JPEG", quality=40)) <= 6
    assert distance(plain, encoded(image.resize((301, 200)))) <= 6
    assert distance(plain, encoded(ImageEnhance.Brightness(image).enhance(1.05), "JPEG")) <= 6
    assert distance(plain, encoded(landscape(900, 600, seed + 100))) > 6


def test_every_mode_and_orientation_has_the_look_of_what_is_trained_on():
    image = landscape(64, 48, 3)
    tags = Image.Exif()
    tags[274] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    clear = image.convert("RGBA")
    clear.putalpha(255)

    looks = [look_at(encoded(kind), "x", decodes=True) for kind in (image, clear)] + [
        look_at(encoded(turned, "JPEG", exif=tags, quality=95), "x", decodes=True)
    ]

    assert looks[0].hash == looks[1].hash
    assert bin(looks[0].hash ^ looks[2].hash).count("1") <= 6
    assert decode_rgb(encoded(turned, "JPEG", exif=tags), "a.jpg", 32).size == (32, 24)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes_decode_to_small_rgb(mode):
    image = Image.new("I;16", (300, 200), 40000) if mode == "I;16" else landscape(300, 200, 1).convert(mode)

    small = decode_rgb(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "a.png", 100)

    assert (small.mode, small.size) == ("RGB", (100, 67))


def test_damage_is_a_fault_and_no_error():
    whole = encoded(landscape(300, 200, 1), "WEBP", lossless=True)
    damaged = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)

    look = look_at(damaged, "x.webp", decodes=False)

    assert look.header.fault == "broken" and look.content and not look.colours
