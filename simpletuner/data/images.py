"""A file's bytes to the pixels that a model sees: upright, RGB, 8 bits, sRGB, resized once, cropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms

from simpletuner.data.faults import foreign_profile, is_16_bit, open_image, orientation
from simpletuner.errors import DatasetError
from simpletuner.types import Geometry, Size

if TYPE_CHECKING:
    from torch import Tensor

WHITE, BLACK = 255, 0
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the image upright."""


def read_pixels(data: bytes, geometry: Geometry, name: str) -> Tensor:
    """Decode one image as its geometry says.

    Args:
        data: the whole file.
        geometry: of its sample.
        name: of the sample, for messages.

    Returns:
        (3, H, W), float32 in [-1, 1], H and W those of the bucket.

    Raises:
        DatasetError: the bytes are damaged, or of another size than when the image was indexed.
    """
    import torch  # here, so that who only wants images waits for no torch

    image = cut(decode_as(data, geometry, name), geometry, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3), bytes
    return pixels.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()  # (3, H, W)


def read_mask(data: bytes, geometry: Geometry, name: str) -> Tensor:
    """Decode a mask as its geometry says: how much each pixel counts is its red; what is transparent does not count.

    Returns:
        (1, H, W), float32 in [0, 1].

    Raises:
        DatasetError: as `read_pixels` does.
    """
    return weights(decode_as(data, geometry, name, BLACK).getchannel("R"), geometry)


def read_segmentation(data: bytes, geometry: Geometry, name: str) -> Tensor:
    """Decode a segmentation as its geometry says: what is not black counts; what is transparent does not.

    Returns:
        (1, H, W), float32 in [0, 1].

    Raises:
        DatasetError: as `read_pixels` does.
    """
    counts = np.asarray(decode_as(data, geometry, name, BLACK)).any(axis=2)  # before resizing, which would smear dark colours into black
    return weights(Image.fromarray(counts.astype(np.uint8) * 255), geometry)


def weights(image: Image.Image, geometry: Geometry) -> Tensor:
    import torch

    image = cut(image, geometry, Image.Resampling.BILINEAR)  # not Lanczos: it overshoots at edges
    return torch.from_numpy(np.array(image))[None].to(torch.float32).div(255.0)  # (1, H, W)


def decode_as(data: bytes, geometry: Geometry, name: str, ground: int = WHITE) -> Image.Image:
    """Decode an image of a known size."""
    image = decode_rgb(data, name, ground=ground)
    if Size(*image.size) != geometry.original:
        raise DatasetError(
            f"{name} is {Size(*image.size)} pixels, but was {geometry.original} when the run began",
            hint="It was changed since; start the same command again.",
        )
    return image


def cut(image: Image.Image, geometry: Geometry, resampling: Image.Resampling) -> Image.Image:
    """Resize and crop."""
    resized, crop = geometry.resized, geometry.crop
    if geometry.original != resized:
        image = image.resize((resized.width, resized.height), resampling)
    return image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))


def decode_rgb(data: bytes, name: str, longest_px: int | None = None, ground: int = WHITE) -> Image.Image:
    """Decode the first frame, upright, as 8-bit RGB in sRGB.

    Args:
        ground: the grey that lies under what is transparent.
        longest_px: for a look at it only: no side is longer, and a JPEG is decoded at a fraction of its size.

    Raises:
        DatasetError: the bytes are damaged.
    """
    try:
        with open_image(data) as image:
            turn = 1 if image.format == "TIFF" else orientation(image, data)  # Pillow turns a TIFF when it decodes it
            has_16_bits = is_16_bit(image, data)
            if longest_px is not None:
                image.draft(None, (2 * longest_px, 2 * longest_px))  # without effect on other formats
            image.load()
            flat = flatten(image, has_16_bits, ground)
            if longest_px is not None and max(flat.size) > longest_px:
                scale = longest_px / max(flat.size)
                flat = flat.resize((max(1, round(flat.width * scale)), max(1, round(flat.height * scale))), Image.Resampling.BOX)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow's decoders fail with nearly any error
        raise DatasetError(
            f"{name} cannot be decoded: {error}", hint="Replace or remove the file; the next start will skip it if it is still broken."
        ) from error
    return flat.transpose(TURNS[turn]) if turn in TURNS else flat


def flatten(image: Image.Image, has_16_bits: bool, ground: int = WHITE) -> Image.Image:
    """Make any kind of decoded image 8-bit RGB."""
    foreign = foreign_profile(image.info.get("icc_profile"), image.mode)
    if has_16_bits and image.mode.startswith("I"):
        image = eight_bits(image)
    elif image.has_transparency_data:
        image = laid_on(image, ground)
    if foreign is None or image.mode != "CMYK":
        image = image.convert("RGB")
    if foreign is None:
        return image
    try:
        converted = ImageCms.profileToProfile(image, foreign, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:  # a profile without the tables for this: the numbers are taken as they are
        return image.convert("RGB")
    assert converted is not None
    return converted


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale greys of 16 bits, 0 to 65535, to 0 to 255; Pillow's own conversion would clip them."""
    greys = np.asarray(image).astype(np.float32) / 257.0
    return Image.fromarray(np.clip(np.rint(greys), 0, 255).astype(np.uint8))


def laid_on(image: Image.Image, ground: int) -> Image.Image:
    """Lay what is transparent on a grey."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (ground, ground, ground, 255)), image).convert("RGB")
