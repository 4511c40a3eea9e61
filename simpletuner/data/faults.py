"""What an image's bytes say before it is used: its upright size, what will be converted, and what makes it unusable."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""Files that are looked at as images, whatever the case of the letters."""
FOREIGN_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".ico", ".tga", ".exr", ".hdr"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
)
"""Images of kinds that are not read; counted, so that nobody wonders where they went."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N"})
COLOURED = MODES & {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"}
CHECKED_BY_BYTES = ("JPEG", "MPO", "PNG", "WEBP")
"""Formats of which damage shows without decoding; of the others, the first frame is decoded when an image is first seen."""
LIMIT_PX = 2 * 89_478_485
"""Pixels from which Pillow refuses an image as a decompression bomb."""
LIMIT_BYTES = 2**30
"""Bytes from which on a file is not fetched or unpacked from elsewhere: more than a sane picture of `LIMIT_PX` pixels has."""

RULES = {
    "zero-byte": "the file is empty",
    "broken": "it cannot be read as an image",
    "truncated": "the file ends before the picture does",
    "unsupported": f"a format or pixel type that is not read ({', '.join(FORMATS)} are, with 8 or 16 bits a channel)",
    "huge": f"{LIMIT_PX:,} pixels or more",
    "unreadable": "the file cannot be opened",
    "not there": "there is no such file",
    "outside": "a link or name that leads out of the dataset, or nowhere",
    "too many bytes": f"{LIMIT_BYTES:,} bytes or more",
    "not fetched": "its address could not be read; tried again at the next start",
    "too small": "under minimum_image_size",
    "aspect": "outside minimum_aspect_ratio to maximum_aspect_ratio",
    "no caption": "it has no caption file, or the table, column or shard has none for it",
    "no companion": "its mask or reference is missing: a file of the same name in each of its conditioning datasets",
    "other shape": "its mask or strict reference has another width over height",
    "not drawn": "beyond max_num_samples",
}
"""Why an image is skipped. None is ever deleted."""
OF_BROKEN_FILES = ("zero-byte", "broken", "truncated", "unsupported", "huge", "unreadable", "not there", "outside", "too many bytes", "not fetched")
"""Those of them that a run refuses with `broken_images` refuse: something is wrong with the file, nobody chose to leave it out."""
TRAITS = {
    "rotated": "turned upright by the EXIF orientation",
    "CMYK": "converted from CMYK to RGB",
    "16-bit": "scaled from 16 to 8 bits a channel",
    "animated": "more than one frame; the first is used",
    "alpha": "transparency laid on white",
    "profile": "converted from the embedded colour profile to sRGB",
}
"""What is done to an image that is kept."""

EXIF_ORIENTATION = 274
TIFF_WIDTH, TIFF_HEIGHT = 256, 257


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of an image without decoding it."""

    width: int = 0
    """Upright, in pixels; 0 if `fault`."""
    height: int = 0
    traits: tuple[str, ...] = ()
    fault: str | None = None


def look(data: bytes, name: str) -> Header:
    """Read an image's header and check that the file is whole.

    Args:
        data: the whole file.
        name: its name, of which the suffix tells a format that this Pillow was built without from a broken file.
    """
    if not data:
        return Header(fault="zero-byte")
    try:
        with open_image(data) as image:
            if image.mode not in MODES and not is_16_bit(image, data):
                return Header(fault="unsupported")
            turn = orientation(image, data)
            width, height = raw_size(image)
            if turn >= 5:
                width, height = height, width
            header = Header(width, height, tuple(traits_of(image, data, turn)))
            fault = damage(data)
            if fault is None and image.format not in CHECKED_BY_BYTES:
                image.load()
            return header if fault is None else Header(fault=fault)
    except Image.DecompressionBombError:
        return Header(fault="huge")
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow's readers fail with nearly any error
        return Header(fault="truncated" if "truncated" in str(error).lower() else diagnose(data, name))


def glance(head: bytes, size_bytes: int) -> Header | None:
    """Read an image's header from the first bytes of its file; None if these do not tell, so that the whole file must be read.

    What only the whole file shows is left to `look` when that is read anyway: damage behind the header, the further frames
    of a GIF, and an EXIF orientation that stands behind the picture of a PNG.
    """
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return glance_webp(head, size_bytes)
    if not head.startswith((b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")):
        return None
    try:
        with open_image(head) as image:
            if image.mode not in MODES and not is_16_bit(image, head):
                return Header(fault="unsupported")
            turn = orientation(image, head)
            width, height = image.size if turn < 5 else (image.size[1], image.size[0])
            return Header(width, height, tuple(traits_of(image, head, turn)))
    except Image.DecompressionBombError:
        return Header(fault="huge")
    except MemoryError:
        raise
    except Exception:  # the header goes on behind these bytes, or is damaged; the whole file will tell
        return None


def glance_webp(head: bytes, size_bytes: int) -> Header | None:
    """Do so for WebP, of which Pillow wants the whole file. Layout: RFC 9649, sections 2.5 to 2.7."""
    if size_bytes < 8 + struct.unpack("<I", head[4:8])[0]:
        return Header(fault="truncated")
    kind, body = head[12:16], head[20:30]
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", body[6:10])
        return Header(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = struct.unpack("<I", body[1:5])[0]
        traits = ("alpha",) if bits >> 28 & 1 else ()
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, traits)
    return None  # VP8X: animation, transparency, profile or EXIF, which may stand at the end


def open_image(data: bytes) -> Image.Image:
    """Open an image of the formats that are read, decoding nothing."""
    return Image.open(io.BytesIO(data), formats=available_formats())


@lru_cache(maxsize=1)
def available_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def diagnose(data: bytes, name: str) -> str:
    """Tell why an image did not open: its end is missing, its format is not read, or it is no image."""
    if fault := damage(data):
        return fault
    is_avif = data[4:12] in (b"ftypavif", b"ftypavis")
    is_foreign = data[4:8] == b"ftyp" or data.startswith((b"8BPS", b"%PDF", b"\x00\x00\x00\x0cjP", b"\x00\x00\x00\x0cJXL", b"\xff\x0a", b"<svg"))
    if is_avif:
        return "broken" if "AVIF" in available_formats() else "unsupported"
    return "unsupported" if is_foreign or PurePosixPath(name).suffix.lower() not in SUFFIXES else "broken"


def raw_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as stored. Pillow turns a TIFF by itself, when exactly depends on its version; the tags do not."""
    return (image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT]) if isinstance(image, TiffImageFile) else image.size


def orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation, 1 to 8, without decoding."""
    if image.format == "PNG" and "exif" not in image.info:
        # Pillow would decode the whole picture to find a chunk behind it.
        chunk = next((data[start : start + size] for kind, start, size in png_chunks(data) if kind == b"eXIf"), None)
        if chunk is None:
            return 1
        exif = Image.Exif()
        exif.load(b"Exif\x00\x00" + chunk)
    else:
        exif = image.getexif()
    value = exif.get(EXIF_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def traits_of(image: Image.Image, data: bytes, turn: int) -> Iterator[str]:
    """Name what will be done to the image."""
    if turn != 1:
        yield "rotated"
    if image.mode == "CMYK":
        yield "CMYK"
    if is_16_bit(image, data):
        yield "16-bit"
    if image.format != "MPO" and getattr(image, "is_animated", False):  # an MPO's other pictures are previews
        yield "animated"
    if image.has_transparency_data:
        yield "alpha"
    if foreign_profile(image.info.get("icc_profile"), image.mode) is not None:
        yield "profile"


def is_16_bit(image: Image.Image, data: bytes) -> bool:
    """Whether channels hold 16 bits; Pillow gives colours as 8 bits by itself and greys as I;16, or I in older versions."""
    if image.format == "PNG":
        return data[24:25] == b"\x10"
    return image.mode.startswith("I;16")


def foreign_profile(profile: bytes | None, mode: str) -> ImageCms.ImageCmsProfile | None:
    """Give the embedded colour profile if colours look different without it: not sRGB, and meant for this kind of image."""
    space = "CMYK" if mode == "CMYK" else "RGB " if mode in COLOURED else None
    return parse_profile(profile, space) if profile and space else None


@lru_cache(maxsize=64)
def parse_profile(profile: bytes, space: str) -> ImageCms.ImageCmsProfile | None:
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        is_plain = "srgb" in ImageCms.getProfileDescription(parsed).lower()
    except (OSError, ImageCms.PyCMSError):  # a damaged profile: the numbers are taken as they are
        return None
    return None if is_plain or parsed.profile.xcolor_space != space else parsed


def damage(data: bytes) -> str | None:
    """Check cheaply that a file is whole; None also for formats that need decoding for that."""
    if data.startswith(b"\xff\xd8"):
        return None if jpeg_has_end(data) else "truncated"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return png_damage(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return None if len(data) >= 8 + struct.unpack("<I", data[4:8])[0] else "truncated"
    return None


def jpeg_has_end(data: bytes) -> bool:
    """Look for the end marker after the first scan begins: within a scan a marker's bytes cannot occur by chance."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # stray bytes, which decoders forgive
            return data.rfind(b"\xff\xd9", position) >= 0
        marker = data[position + 1]
        if marker == 0xDA:
            return data.rfind(b"\xff\xd9", position) >= 0
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes, and markers without a length
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    return False


def png_damage(data: bytes) -> str | None:
    """Look for the last chunk, and compare each one's checksum."""
    view = memoryview(data)
    last = b""
    for kind, start, size in png_chunks(data):
        if zlib.crc32(view[start - 4 : start + size]) != struct.unpack(">I", view[start + size : start + size + 4])[0]:
            return "broken"
        last = kind
    return None if last == b"IEND" else "truncated"


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and length of each chunk that is there in full."""
    position = 8
    while position + 12 <= len(data):
        size = struct.unpack(">I", data[position : position + 4])[0]
        if position + 12 + size > len(data):
            return
        kind = data[position + 4 : position + 8]
        yield kind, position + 8, size
        if kind == b"IEND":
            return
        position += 12 + size
