"""What images look like, found by decoding each once and small: a digest of the bytes, a perceptual hash, a few colours.

The hash is a difference hash: of the image at 9 x 8 greys, whether each is clearly lighter than its right neighbour. It hardly
changes when an image is scaled, compressed again or a little lighter, and is another for another picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from simpletuner.data.backend import DataBackend
from simpletuner.data.faults import Header, look
from simpletuner.data.images import decode_rgb
from simpletuner.data.index import digest
from simpletuner.errors import DatasetError

SMALL_PX = 128
"""Longest side from which hash and colours are taken."""
MARGIN = 2
"""Greys by which neighbours must differ: in a flat area the compression would decide otherwise."""
COLOUR_SIDE = 12
CHUNK = 256
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Look:
    """What one image looks like."""

    content: str
    """Digest of its bytes; empty if they could not be read."""
    header: Header
    """What the whole file says of itself; `header.fault` is the rule by which it is skipped."""
    hash: int = 0
    """64 bits."""
    colours: bytes = b""
    """12 x 12 RGB; empty if the image is skipped."""
    mirror_hash: int = 0
    """The hash of its mirror image, which does not follow from its own."""

    @property
    def mirror_colours(self) -> bytes:
        """The colours of its mirror image."""
        return np.frombuffer(self.colours, dtype=np.uint8).reshape(COLOUR_SIDE, COLOUR_SIDE, 3)[:, ::-1].tobytes()


def look_at(data: bytes, name: str, *, decodes: bool) -> Look:
    """Check a whole file and decode it small.

    Args:
        name: for messages.
        decodes: decode it at full size too, in the way of training, which finds damage that the small picture hides.
    """
    content, header = digest(data), look(data, name)
    if header.fault is not None:
        return Look(content, header)
    try:
        if decodes:
            decode_rgb(data, name)
        small = decode_rgb(data, name, SMALL_PX)
    except DatasetError as error:  # the same rules as when training comes to it
        return Look(content, Header(fault="truncated" if "truncated" in error.message.lower() else "broken"))
    colours = small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX).tobytes()
    return Look(content, header, difference_hash(small), colours, difference_hash(ImageOps.mirror(small)))


def difference_hash(image: Image.Image) -> int:
    """Whether each of 8 x 8 places is clearly lighter than its right neighbour, as 64 bits."""
    greys = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = greys[:, :-1] > greys[:, 1:] + MARGIN
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def look_at_all(backend: DataBackend, names: Sequence[str], *, decodes: bool, advance: Callable[[], None]) -> list[Look]:
    """Look at images of one dataset, in order.

    Args:
        advance: called after each.
    """

    def read_and_look(name: str) -> Look:
        try:
            return look_at(backend.read(name), name, decodes=decodes)
        except DatasetError:
            return Look("", Header(fault="unreadable"))

    looks = []
    for found in in_threads(names, read_and_look):
        looks.append(found)
        advance()
    return looks


def in_threads(names: Sequence[str], work: Callable[[str], T]) -> Iterator[T]:
    """Work on names in several threads, in order, a bounded number ahead; Pillow lets go of the interpreter while it decodes."""
    waiting = iter(names)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        while chunk := list(islice(waiting, CHUNK)):
            yield from pool.map(work, chunk)
