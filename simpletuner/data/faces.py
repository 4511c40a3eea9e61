"""Where faces are: looked for once an image, by OpenCV's cascade for faces seen from the front, on a reduced picture."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from simpletuner.data.faults import look
from simpletuner.data.geometry import Face, divide
from simpletuner.data.images import decode_rgb
from simpletuner.errors import ConfigError

LONGEST_PX = 640
"""Longest side of the picture that is searched: a JPEG is decoded at a fraction of its size, and the search takes some 10 ms."""
SMALLEST_PX = 32
"""Of that picture, the smallest face: a twentieth of it. Nearer to the 20 px that the cascade reads, walls and leaves become faces."""
SCALE_STEP = 1.1
NEIGHBOURS = 5
"""Overlapping finds that make a face."""


class FaceFinder:
    """Finds the largest face of an image. Safe to use from many threads: each has a cascade of its own."""

    def __init__(self) -> None:
        """
        Raises:
            ConfigError: the OpenCV that is installed has no cascades.
        """
        import cv2

        if not hasattr(cv2, "CascadeClassifier"):
            raise ConfigError(
                f"crop_style 'face' needs OpenCV 4; {cv2.__version__}, which is installed, has no cascades",
                hint="pip install 'simpletuner[faces]'",
            )
        from cv2.data import haarcascades

        cv2.setNumThreads(1)  # images are searched side by side
        self._cascade_type, self._file = cv2.CascadeClassifier, os.path.join(haarcascades, "haarcascade_frontalface_alt2.xml")
        self._mine = threading.local()

    def find(self, data: bytes, name: str) -> Face | None:
        """Find the largest face of an image; of several that are alike large, the leftmost and uppermost.

        Args:
            data: the whole file.
            name: for messages.

        Raises:
            DatasetError: the bytes are damaged.
        """
        header = look(data, name)
        if header.fault is not None:
            return None
        small = decode_rgb(data, name, LONGEST_PX)
        found = self._cascade.detectMultiScale(np.asarray(small.convert("L")), SCALE_STEP, NEIGHBOURS, minSize=(SMALLEST_PX, SMALLEST_PX))
        if not len(found):
            return None
        left, top, width, height = min(np.asarray(found).tolist(), key=lambda box: (-box[2] * box[3], box))
        return Face(
            divide(left * header.width, small.width),
            divide(top * header.height, small.height),
            divide(width * header.width, small.width),
            divide(height * header.height, small.height),
        )

    @property
    def _cascade(self) -> Any:
        if not hasattr(self._mine, "cascade"):
            self._mine.cascade = self._cascade_type(self._file)
        return self._mine.cascade
