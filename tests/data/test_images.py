from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from simpletuner.data.faults import LIMIT_PX, look
from simpletuner.data.geometry import GeometryRule, Measure, fit
from simpletuner.data.images import decode_rgb, read_pixels
from simpletuner.errors import DatasetError
from simpletuner.types import Crop, Geometry, Size


def encode(image: Image.Image, kind: str, **arguments) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data, "x"))


def as_is(image: Image.Image) -> Geometry:
    size = Size(*image.size)
    return Geometry(size, size, Crop(0, 0, size.width, size.height))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def test_pixels_are_rgb_planes_from_minus_one_to_one(picture):
    image = picture()

    pixels = read_pixels(encode(image, "PNG"), as_is(image), "x")

    expected = np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 127.5 - 1
    assert (pixels.dtype, tuple(pixels.shape), pixels.is_contiguous()) == (torch.float32, (3, 32, 48), True)
    assert np.abs(pixels.numpy() - expected).max() < 1e-6


def test_black_and_white_are_the_ends_of_the_range():
    for level, value in ((0, -1.0), (255, 1.0)):
        image = Image.new("RGB", (8, 8), (level, level, level))
        assert read_pixels(encode(image, "PNG"), as_is(image), "x").unique().tolist() == [value]


def test_the_image_is_resized_by_lanczos_and_then_cropped(picture):
    image = picture(100, 60)
    geometry = Geometry(Size(100, 60), Size(67, 40), Crop(left=11, top=3, width=48, height=32))

    pixels = read_pixels(encode(image, "PNG"), geometry, "x")

    expected = np.asarray(image.resize((67, 40), Image.Resampling.LANCZOS))[3:35, 11:59].transpose(2, 0, 1)
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_in_header_and_pixels(picture, kind, orientation):
    data = encode(picture(), kind, exif=exif(orientation))

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")

    header = look(data, "x")
    assert (header.width, header.height) == upright.size == ((48, 32) if orientation < 5 else (32, 48))
    assert ("rotated" in header.traits) == (orientation != 1)
    assert np.array_equal(decoded(data), np.asarray(upright))


def test_a_png_orientation_behind_the_pixels_is_seen_without_decoding(picture):
    data = encode(picture(), "PNG", exif=exif(6))
    start = data.index(b"eXIf") - 4
    size = 12 + int.from_bytes(data[start : start + 4], "big")
    chunk, rest = data[start : start + size], data[:start] + data[start + size :]
    end = rest.index(b"IEND") - 4
    moved = rest[:end] + chunk + rest[end:]

    header = look(moved, "x.png")

    assert (header.width, header.height) == decode_rgb(moved, "x").size == (32, 48)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    greys = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)
    data = encode(Image.fromarray(greys), kind)

    assert look(data, "x").traits == ("16-bit",)
    assert np.array_equal(decoded(data)[..., 1], np.rint(greys.astype(np.float64) / 257).astype(np.uint8))


@pytest.mark.parametrize(("mode", "trait"), [("RGBA", "alpha"), ("LA", "alpha"), ("P", None), ("L", None), ("1", None)])
def test_modes_that_pillow_converts_give_what_it_gives_on_white(picture, mode, trait):
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)

    data = encode(image, "PNG")

    see_through = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = see_through[..., 3:] / 255
    expected = see_through[..., :3] * alpha + 255 * (1 - alpha)
    assert look(data, "x").traits == ((trait,) if trait else ())
    assert np.abs(decoded(data) - expected).max() <= 1


def test_a_transparent_colour_of_a_palette_is_white(picture):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(0, (0, 0, 8, 16))

    data = encode(image, "PNG", transparency=0)

    assert look(data, "x").traits == ("alpha",)
    assert decoded(data)[0, 0].tolist() == [255, 255, 255]
    assert decoded(data)[0, 15].tolist() == [200, 0, 0]


def test_cmyk_is_converted(picture):
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)

    assert look(data, "x").traits == ("CMYK",)
    assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")])
def test_of_an_animation_the_first_frame_is_used(kind, suffix):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    arguments = {"lossless": True} if kind == "WEBP" else {}
    data = encode(red, kind, save_all=True, append_images=[blue], **arguments)

    assert "animated" in look(data, f"x.{suffix}").traits
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


def test_a_colour_profile_other_than_srgb_is_honoured(picture):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with its red and green primaries exchanged, and a name that does not say sRGB.
    swapped = bytearray(srgb.replace(b"s\x00R\x00G\x00B", b"t\x00R\x00G\x00B").replace(b"sRGB", b"tRGB"))
    red, green = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    image = picture()

    with_lab, with_srgb, with_swapped = (encode(image, "PNG", icc_profile=bytes(profile)) for profile in (lab, srgb, swapped))

    assert [look(data, "x").traits for data in (with_lab, with_srgb, with_swapped)] == [(), (), ("profile",)]
    assert np.array_equal(decoded(with_lab), np.asarray(image))
    assert np.array_equal(decoded(with_srgb), np.asarray(image))
    assert np.abs(decoded(with_swapped).astype(int) - np.asarray(image)[..., [1, 0, 2]]).max() <= 2
    palette = image.convert("P")
    with_palette = encode(palette, "PNG", icc_profile=bytes(swapped))
    assert look(with_palette, "x").traits == ("profile",)
    assert np.abs(decoded(with_palette).astype(int) - np.asarray(palette.convert("RGB"))[..., [1, 0, 2]]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_cut_off_anywhere_is_seen_from_its_bytes(picture, kind):
    arguments = {"exif": exif(1)} if kind == "JPEG" else {}
    data = encode(picture(), kind, **arguments)

    for size in range(1, len(data) - 1, 7):
        assert look(data[:size], "x.png").fault in ("truncated", "broken"), size
        with suppress(DatasetError):  # where only a checksum is missing, all of the picture is still there
            assert np.array_equal(decoded(data[:size]), decoded(data))
    assert look(data[: len(data) - 40], "x.jpg").fault == "truncated"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_an_image_of_any_other_kind_cut_off_is_seen_too(picture, kind):
    data = encode(picture(), kind)

    assert look(data, "x.png").fault is None
    assert look(data[: len(data) // 2], "x.png").fault in ("truncated", "broken")
    with pytest.raises(DatasetError, match="x cannot be decoded"):
        decode_rgb(data[: len(data) // 2], "x")


def test_a_flipped_bit_in_a_png_is_seen(picture):
    data = bytearray(encode(picture(), "PNG"))
    data[len(data) // 2] ^= 1

    assert look(bytes(data), "x.png").fault == "broken"


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm(picture):
    data = encode(picture(), "JPEG") + b"\x00" * 100 + b"trailer of a phone"

    assert look(data, "x.jpg").fault is None
    assert decoded(data).shape == (32, 48, 3)


def test_the_end_of_an_embedded_preview_is_not_taken_for_the_end(picture):
    tags = exif(1)
    tags[0x9286] = encode(picture(8, 8), "JPEG")  # user comment that holds a whole JPEG
    data = encode(picture(), "JPEG", exif=tags)

    assert data.count(b"\xff\xd9") >= 2
    assert look(data[:-30], "x.jpg").fault == "truncated"


@pytest.mark.parametrize(
    ("data", "name", "fault"),
    [
        (b"", "x.png", "zero-byte"),
        (b"no image at all", "x.png", "broken"),
        (b"<html>not found</html>" * 10, "x.jpg", "broken"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(40), "x.jpg", "unsupported"),
        (b"8BPS" + bytes(40), "x.png", "unsupported"),
    ],
)
def test_what_is_no_image_is_named_by_its_rule(data, name, fault):
    assert look(data, name).fault == fault


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_not_guessed_at(dtype):
    assert look(encode(Image.fromarray(np.zeros((8, 8), dtype)), "TIFF"), "x.tif").fault == "unsupported"


def test_a_decompression_bomb_is_refused_from_its_header():
    side = int(LIMIT_PX**0.5) + 1
    header = bytearray(encode(Image.new("1", (8, 8)), "BMP"))
    header[18:22], header[22:26] = side.to_bytes(4, "little"), side.to_bytes(4, "little")

    assert look(bytes(header), "x.bmp").fault == "huge"


def test_an_image_that_changed_its_size_is_named(picture):
    geometry = fit(Size(64, 64), GeometryRule(Measure(32, "pixel_area"), 8, 2, is_cropped=False), random=0)

    with pytest.raises(DatasetError, match=r"set/a.png is 48x32 pixels, but was 64x64 when the run began"):
        read_pixels(encode(picture(), "PNG"), geometry, "set/a.png")
