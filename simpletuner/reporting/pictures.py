"""Pictures as bytes that are not too many for a message."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 92
SMALLEST_PX = 64


def as_jpeg(image: Image, most_bytes: int) -> bytes:
    """Write a picture as JPEG, shrunk by halves until it is within a size; below 64 px on its shorter edge it stays as it is."""
    picture = flattened(image)
    while True:
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=QUALITY)
        if written.tell() <= most_bytes or min(picture.size) < 2 * SMALLEST_PX:
            return written.getvalue()
        picture = picture.reduce(2)


def flattened(image: Image) -> Image:
    """The picture in three colours; what shows through is white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        from PIL import Image as Images

        image = image.convert("RGBA")
        return Images.alpha_composite(Images.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
