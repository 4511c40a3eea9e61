"""Where an image is resized to and cropped: pure functions of whole numbers, the same on every machine.

The rule is written out in docs/dataloader.md. Sides are pixels; an aspect is width over height as an exact fraction.
Everything but a random draw is worked out for the landscape form and turned back, so portrait mirrors landscape.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Literal

from simpletuner.randomness import seed_from
from simpletuner.types import Crop, Geometry, Size

Unit = Literal["pixel", "area", "pixel_area"]
CropStyle = Literal["center", "random", "corner", "face"]
CropAspect = Literal["square", "preserve", "closest", "random"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A size as users write it: `pixel` is the shorter edge, `pixel_area` N is the area of N x N pixels, `area` is megapixels."""

    value: float
    unit: Unit

    @property
    def area_px(self) -> int:
        """Pixels of the whole picture, or of the square on the shorter edge."""
        return round(self.value * 1_000_000) if self.unit == "area" else round(self.value) ** 2

    def of(self, size: Size) -> int:
        """Measure a picture so that it compares with `limit`: its shorter edge, or its area, in pixels."""
        return min(size.width, size.height) if self.unit == "pixel" else size.width * size.height

    @property
    def limit(self) -> int:
        return round(self.value) if self.unit == "pixel" else self.area_px

    def __str__(self) -> str:
        if self.unit == "area":
            return f"{self.value:g} megapixels"
        return f"{self.value:g} px on the shorter edge" if self.unit == "pixel" else f"{self.value:g} x {self.value:g} px of area"


@dataclass(frozen=True, slots=True)
class AspectChoice:
    """One of `crop_aspect_buckets`: width over height, and how often `random` takes it."""

    aspect: Fraction
    weight: Fraction


@dataclass(frozen=True, slots=True)
class Face:
    """Where a face lies in an upright image, in that image's pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class GeometryRule:
    """How the images of one dataset become training pictures."""

    resolution: Measure
    alignment_px: int
    """Both sides of a bucket are multiples of this."""
    aspect_decimals: int
    """Aspects are rounded to so many decimals before a bucket is chosen."""
    is_cropped: bool
    """Whether the picture takes its shape from `crop_aspect`; else it follows the image."""
    crop_style: CropStyle = "center"
    crop_aspect: CropAspect = "square"
    choices: tuple[AspectChoice, ...] = ()
    minimum: Measure | None = None
    maximum: Measure | None = None
    target: Measure | None = None
    minimum_aspect: float | None = None
    maximum_aspect: float | None = None
    crops: int = 1
    """With `crop_style` random: crops of an image that are drawn in turn; 0 is a fresh one at each draw."""

    @property
    def is_random(self) -> bool:
        """Whether `fit` depends on its seed; with `crop_style` face it does for images without one."""
        return self.crop_style in ("random", "face") or (self.is_cropped and self.crop_aspect == "random")

    def __str__(self) -> str:
        size = f"{self.resolution}, sides in steps of {self.alignment_px} px"
        if not self.is_cropped:
            return f"{size}; whole picture"
        before = f" after {self.target} if over {self.maximum}" if self.maximum is not None else ""
        kept = f", {self.crops} places an image" if self.crops > 1 and self.crop_style == "random" else ""
        return f"{size}; crop {self.crop_aspect}, {self.crop_style}{kept}{before}"


def fit(original: Size, rule: GeometryRule, random: int, face: Face | None = None) -> Geometry:
    """Say how an image becomes a training picture.

    Args:
        original: upright size.
        rule: of its dataset.
        random: seed of this image's draws; looked at only if `rule.is_random`.
        face: the one to cut around; looked at only if `rule.crop_style` is face.
    """
    bucket = bucket_for(original, rule, random)
    resized = before_crop(original, bucket, rule)
    if rule.crop_style == "face" and face is not None:
        return Geometry(original, resized, around(face, original, resized, bucket))
    return Geometry(original, resized, place(resized, bucket, rule.crop_style, random))


def refusal(original: Size, rule: GeometryRule) -> str | None:
    """Name the rule by which an image is left out, or None if it stays."""
    if rule.minimum is not None:
        square = Size(edge := min(original.width, original.height), edge)
        # Of a long thin image a square crop keeps the shorter edge only, so that is what must be large enough.
        seen = square if rule.is_cropped and rule.crop_aspect == "square" else original
        if rule.minimum.of(seen) < rule.minimum.limit:
            return "too small"
    aspect = original.width / original.height
    if (rule.minimum_aspect is not None and aspect < rule.minimum_aspect) or (rule.maximum_aspect is not None and aspect > rule.maximum_aspect):
        return "aspect"
    return None


def bucket_for(original: Size, rule: GeometryRule, random: int) -> Size:
    """Choose the size of the training picture."""
    aspect = Fraction(original.width, original.height)
    if rule.is_cropped and rule.crop_aspect == "square":
        aspect = Fraction(1)
    elif rule.is_cropped and rule.crop_aspect == "closest":
        aspect = min((choice.aspect for choice in rule.choices), key=lambda choice: (max(choice / aspect, aspect / choice), choice))
    elif rule.is_cropped and rule.crop_aspect == "random":
        aspect = draw_aspect(rule.choices, random)
    return bucket_of(aspect, rule)


def draw_aspect(choices: tuple[AspectChoice, ...], random: int) -> Fraction:
    """Draw one aspect by weight."""
    left = Fraction(seed_from("crop aspect", random), 2**63) * sum(choice.weight for choice in choices)
    for choice in choices:
        left -= choice.weight
        if left < 0:
            return choice.aspect
    return choices[-1].aspect


def bucket_of(aspect: Fraction, rule: GeometryRule) -> Size:
    """Round the ideal sides of a picture of this aspect to the nearest multiples of the alignment, at least one step."""
    step = rule.alignment_px
    scale = 10**rule.aspect_decimals
    wide = max(aspect, 1 / aspect)
    wide = Fraction((2 * wide.numerator * scale + wide.denominator) // (2 * wide.denominator), scale)
    if rule.resolution.unit == "pixel":
        short = nearest(Fraction(rule.resolution.limit), step)
        long = nearest(rule.resolution.limit * wide, step)
    else:
        area = rule.resolution.area_px
        if area < wide * (Fraction(step) / 2) ** 2:  # thinner than half a step: the shorter side is held at one step, the area kept
            short, long = step, nearest(Fraction(area, step), step)
        else:
            short = nearest_root(area / wide, step)
            long = nearest_root(area * wide, step)
    return Size(long, short) if aspect >= 1 else Size(short, long)


def nearest(length: Fraction, step: int) -> int:
    """The multiple of `step` nearest to `length`, a half rounded up, at least one step."""
    return max((2 * length.numerator + step * length.denominator) // (2 * step * length.denominator), 1) * step


def nearest_root(square: Fraction, step: int) -> int:
    """The multiple of `step` nearest to the square root, exactly, at least one step."""
    return max((isqrt(4 * square.numerator // (square.denominator * step * step)) + 1) // 2, 1) * step


def before_crop(original: Size, bucket: Size, rule: GeometryRule) -> Size:
    """The size to which the whole image is resized; it covers the bucket.

    Without `maximum_image_size` as much of the image as possible is kept. With it, the crop is a window: an image over the
    maximum is first brought down to `target_downsample_size`, another keeps its size; either is enlarged if too small to cover.
    """
    if rule.is_cropped and rule.maximum is not None and rule.target is not None:
        size = shrink(original, rule.target) if rule.maximum.of(original) > rule.maximum.limit else original
        if size.width >= bucket.width and size.height >= bucket.height:
            return size
    return cover(original, bucket)


def cover(original: Size, bucket: Size) -> Size:
    """The smallest size of the original's aspect that covers the bucket: one side exactly, the other rounded."""
    if bucket.width * original.height >= bucket.height * original.width:
        return Size(bucket.width, divide(original.height * bucket.width, original.width))
    return Size(divide(original.width * bucket.height, original.height), bucket.height)


def shrink(original: Size, target: Measure) -> Size:
    """Bring an image down to a size, keeping its aspect; never up."""
    if target.of(original) <= target.limit:
        return original
    if target.unit == "pixel":
        short = min(original.width, original.height)
        return Size(divide(original.width * target.limit, short), divide(original.height * target.limit, short))
    area = target.area_px
    return Size(nearest_root(Fraction(area * original.width, original.height), 1), nearest_root(Fraction(area * original.height, original.width), 1))


def divide(numerator: int, denominator: int) -> int:
    """Divide and round, a half up."""
    return (2 * numerator + denominator) // (2 * denominator)


def around(face: Face, original: Size, resized: Size, bucket: Size) -> Crop:
    """Lay the crop into the resized image so that a face is in its middle, or as near to it as the image reaches."""
    left = begin(2 * face.left + face.width, original.width, resized.width, bucket.width)
    top = begin(2 * face.top + face.height, original.height, resized.height, bucket.height)
    return Crop(left, top, bucket.width, bucket.height)


def begin(twice_middle: int, original: int, resized: int, length: int) -> int:
    """The first pixel of a stretch of `length` with something in its middle, along one side of the resized image.

    Args:
        twice_middle: of that something, in pixels of the original.
    """
    return min(max(divide(twice_middle * resized - length * original, 2 * original), 0), resized - length)


def place(resized: Size, bucket: Size, style: CropStyle, random: int) -> Crop:
    """Lay the crop into the resized image where no face says where."""
    across, down = resized.width - bucket.width, resized.height - bucket.height
    left, top = 0, 0
    if style == "center":
        left, top = across // 2, down // 2
    elif style in ("random", "face"):
        left, top = seed_from("crop left", random) % (across + 1), seed_from("crop top", random) % (down + 1)
    return Crop(left, top, bucket.width, bucket.height)
