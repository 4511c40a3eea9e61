"""Draw a digit in two looks, dark ink on warm paper and a neon tube at night, from scikit-learn's handwritten digits of 8x8 pixels.

The ridges of an 8x8 picture are the path of the pen: where its Hessian has a strongly negative eigenvalue, there was a stroke.
Thresholding them, at a higher resolution and softly, gives strokes of an even width, as thresholding the picture itself would not.

Letters: N digits, H W pixels of a picture (64 each). Pictures are float64 in [0, 1]; a random generator is NumPy's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Array = NDArray[np.float64]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HUES = {"pink": 0.92, "cyan": 0.50, "amber": 0.08, "green": 0.36, "violet": 0.74, "red": 0.99}
"""Colours of neon that have a name, as parts of the colour wheel."""

SIDE = 64
"""Pixels of a picture's side."""
FINE = 4
"""Strokes are drawn at so many times the resolution, which makes their edges smooth."""
FIELD_CELL = 12
"""Pixels of a stroke field to one of the 8x8."""
CELL = 6
"""Pixels of a picture to one of the 8x8, so that the digit takes up 48 of 64."""

PEN_WIDTH = 0.55
"""Width of the strokes that are looked for, as a standard deviation, in pixels of the 8x8."""
PAPER = np.array([0.962, 0.944, 0.905])
INK = np.array([0.10, 0.11, 0.22])
NIGHT = np.array([0.030, 0.026, 0.060])


def digits() -> tuple[Array, NDArray[np.int64]]:
    """scikit-learn's digits: darkness in [0, 1], (N, 8, 8), and what they show, (N,)."""
    data = load_digits()
    return data.images / 16.0, data.target.astype(np.int64)


def halves(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the digits once and for all: numbers of those to draw from, and of those kept for the judge."""
    drawn, judged = train_test_split(np.arange(len(labels)), test_size=0.5, random_state=0, stratify=labels)
    return drawn, judged


@dataclass(frozen=True, slots=True)
class Cover:
    """How much of each pixel a digit covers, (H, W, 1) each."""

    stroke: Array
    tube: Array
    """A little thinner than the stroke."""
    core: Array
    """The middle of the tube, where it is white."""
    depth: Array
    """Strength of the ridge, not a part: more where the pen pressed harder."""


def strokes(digit: Array) -> Array:
    """Find the pen's path in an 8x8 picture: a field, FIELD_CELL times as fine, that is high where there was a stroke."""
    fine = ndimage.zoom(np.pad(digit, 3), FIELD_CELL, order=3, mode="grid-constant", grid_mode=True)
    sigma = PEN_WIDTH * FIELD_CELL
    smooth = ndimage.gaussian_filter(fine, sigma)
    yy, xx, xy = (ndimage.gaussian_filter(fine, sigma, order=order) * sigma**2 for order in ((2, 0), (0, 2), (1, 1)))
    ridge = np.sqrt(((xx - yy) / 2) ** 2 + xy**2) - (xx + yy) / 2  # minus the lower eigenvalue of the Hessian
    # A wide blot has no ridge; its darkness counts a little too.
    return np.maximum(ridge, 0) + 0.15 * smooth


def draw(field: Array, random: Generator | None = None) -> Cover:
    """Lay a stroke field onto a picture; with `random`, as another attempt of the same hand: a little turned, slanted, scaled, moved."""
    turn, slant, scale, shift = 0.0, 0.0, 1.0, np.zeros(2)
    if random is not None:
        turn, slant, scale = random.normal(0, 0.04), random.normal(0, 0.05), 1 + random.normal(0, 0.03)
        shift = random.normal(0, 0.75 * FINE, 2)
    c, s = np.cos(turn), np.sin(turn)
    # From a place on the fine canvas to one in the field, rows first.
    matrix = np.array([[c, -s], [s, c]]) @ np.array([[1, 0], [slant, 1]]) / scale * FIELD_CELL / (CELL * FINE)
    middle, canvas = (np.array(field.shape) - 1) / 2, (SIDE * FINE - 1) / 2
    placed = ndimage.affine_transform(field, matrix, middle - matrix @ (canvas + shift), (SIDE * FINE,) * 2, order=1)
    return Cover(*(_shrink(layer) for layer in (_step(placed, 0.20, 0.05), _step(placed, 0.25, 0.06), _step(placed, 0.33, 0.09), placed)))


def ink(cover: Cover, random: Generator) -> Array:
    """Dark ink on warm paper, (H, W, 3), both a little different each time."""
    paper = PAPER + random.normal(0, 0.004) + np.array([0, -1, -2.2]) * random.normal(0, 0.003)
    return painted(cover, paper, INK + random.normal(0, 0.02) + np.array([-0.3, 0, 1]) * random.uniform(-0.06, 0.12))


def painted(cover: Cover, paper: Array, paint: Array) -> Array:
    """Any colour on any other, (H, W, 3)."""
    y = np.linspace(-1, 1, SIDE)
    light = 1 - 0.035 * ((y[:, None] ** 2 + y[None] ** 2) / 2)[..., None]  # corners are a little darker
    opacity = cover.stroke * np.clip(0.88 + 0.5 * (_blur(cover.depth, 1.0) - 0.2), 0.82, 1)  # ink pools where the pen pressed
    return np.clip(paper * light * (1 - opacity) + paint * opacity, 0, 1)


def neon(cover: Cover, hue: float, power: float = 1.0) -> Array:
    """A glowing tube at night, (H, W, 3).

    Args:
        hue: part of the colour wheel, 0 to 1.
        power: of the glow around the tube.
    """
    colour = _saturated(hue)
    glow = 0.8 * _blur(cover.tube, 1.3) + 0.85 * _blur(cover.tube, 3.2) + 0.95 * _blur(cover.tube, 8.5)
    light = NIGHT + 0.8 * power * glow * colour
    light = light + _blur(cover.tube, 0.45) * (0.55 * colour + 0.25) + _blur(cover.core, 0.45) * (0.9 - 0.2 * colour)
    return 1 - np.exp(-1.6 * light)  # as film answers: bright light turns white instead of being cut off


def cells(darkness: Array) -> Array:
    """What a digit is recognised by: 64 numbers, the darkness of a (H, W) picture in the 8x8 cells of the middle."""
    margin = (SIDE - 8 * CELL) // 2
    middle = darkness[margin:-margin, margin:-margin]
    return middle.reshape(8, CELL, 8, CELL).mean((1, 3)).reshape(-1)


def _saturated(hue: float) -> Array:
    distance = (np.array([5, 3, 1]) + hue * 6) % 6
    return 1 - 0.95 * np.clip(np.minimum(distance, 4 - distance), 0, 1)


def _step(field: Array, level: float, width: float) -> Array:
    """0 below the level, 1 above it, a smooth rise of some width between."""
    t = np.clip((field - level) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _blur(layer: Array, sigma_px: float) -> Array:
    return ndimage.gaussian_filter(layer, (sigma_px, sigma_px, 0))


def _shrink(fine: Array) -> Array:
    return fine.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3))[..., None]
