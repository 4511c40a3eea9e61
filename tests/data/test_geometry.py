from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from simpletuner.data.geometry import AspectChoice, Face, GeometryRule, Measure, Unit, cover, fit, refusal
from simpletuner.types import Crop, Geometry, Size

SIDES = st.integers(1, 12000)
SIZES = st.builds(Size, SIDES, SIDES)
STEPS = st.sampled_from([1, 4, 8, 16, 32, 64])
SEEDS = st.integers(0, 2**63 - 1)
PIXELS = st.builds(Measure, st.integers(64, 2048), st.sampled_from(["pixel", "pixel_area"]))
MEGAPIXELS = st.builds(Measure, st.floats(0.005, 4.2), st.just("area"))
MEASURES = PIXELS | MEGAPIXELS
CHOICES = tuple(AspectChoice(Fraction(aspect), Fraction(1, 4)) for aspect in ("1.0", "0.75", "1.5", "0.5"))


@st.composite
def rules(draw):
    maximum = draw(st.none() | MEASURES)
    return GeometryRule(
        resolution=draw(MEASURES),
        alignment_px=draw(STEPS),
        aspect_decimals=draw(st.integers(1, 9)),
        is_cropped=draw(st.booleans()),
        crop_style=draw(st.sampled_from(["center", "random", "corner", "face"])),
        crop_aspect=draw(st.sampled_from(["square", "preserve", "closest", "random"])),
        choices=CHOICES,
        maximum=maximum,
        target=None if maximum is None else draw(MEASURES),
    )


@st.composite
def faces(draw):
    """The upright size of an image, and a face in it."""
    original = draw(SIZES)
    left, top = draw(st.integers(0, original.width - 1)), draw(st.integers(0, original.height - 1))
    return original, Face(left, top, draw(st.integers(1, original.width - left)), draw(st.integers(1, original.height - top)))


def rule(value: float = 1024, unit: Unit = "pixel_area", step: int = 64, **others: Any) -> GeometryRule:
    return GeometryRule(**{"resolution": Measure(value, unit), "alignment_px": step, "aspect_decimals": 2, "is_cropped": False, **others})


def cropped(**others: Any) -> GeometryRule:
    return rule(**{"is_cropped": True, **others})


def bucket(width: int, height: int, of: GeometryRule) -> str:
    return str(fit(Size(width, height), of, random=0).bucket)


def flipped(size: Size) -> Size:
    return Size(size.height, size.width)


@given(SIZES, rules(), SEEDS)
def test_the_crop_lies_inside_the_resized_image_and_its_sides_are_aligned(original, of, seed):
    geometry = fit(original, of, seed)

    assert geometry.original == original
    assert 0 <= geometry.crop.left <= geometry.resized.width - geometry.crop.width
    assert 0 <= geometry.crop.top <= geometry.resized.height - geometry.crop.height
    assert geometry.bucket.width % of.alignment_px == 0 and geometry.bucket.width > 0
    assert geometry.bucket.height % of.alignment_px == 0 and geometry.bucket.height > 0


@given(SIZES, rules(), SEEDS)
def test_nothing_is_distorted_beyond_rounding_to_whole_pixels(original, of, seed):
    resized = fit(original, of, seed).resized

    # One scale explains both sides, each within half a pixel.
    least = max(Fraction(2 * resized.width - 1, 2 * original.width), Fraction(2 * resized.height - 1, 2 * original.height))
    most = min(Fraction(2 * resized.width + 1, 2 * original.width), Fraction(2 * resized.height + 1, 2 * original.height))
    assert least <= most


@given(SIZES, rules(), SEEDS)
def test_portrait_and_landscape_mirror_each_other(original, of, seed):
    assume(of.crop_aspect not in ("closest", "random") or not of.is_cropped)

    one, other = fit(original, of, seed), fit(flipped(original), of, seed)

    assert other.resized == flipped(one.resized)
    assert other.bucket == flipped(one.bucket)
    if of.crop_style not in ("random", "face"):
        assert (other.crop.left, other.crop.top) == (one.crop.top, one.crop.left)


@given(SIZES, rules(), SEEDS, SEEDS)
def test_the_result_is_a_function_of_the_seed_and_only_where_a_draw_is_asked_for(original, of, seed, other_seed):
    assert fit(original, of, seed) == fit(original, of, seed)
    if not of.is_random:
        assert fit(original, of, seed) == fit(original, of, other_seed)


@given(SIZES, MEASURES, STEPS)
def test_each_side_of_a_bucket_is_within_half_a_step_of_its_ideal(original, resolution, step):
    got = fit(original, GeometryRule(resolution, step, aspect_decimals=9, is_cropped=False), random=0).bucket

    aspect = original.width / original.height
    if resolution.unit == "pixel":
        short = resolution.value
        ideal = (short * max(aspect, 1), short * max(1 / aspect, 1))
    else:
        ideal = ((resolution.area_px * aspect) ** 0.5, (resolution.area_px / aspect) ** 0.5)
    assume(min(ideal) >= step)  # thinner pictures are held at one step, see below
    assert abs(got.width - ideal[0]) <= step / 2 + 1e-3 * ideal[0] ** 0.5
    assert abs(got.height - ideal[1]) <= step / 2 + 1e-3 * ideal[1] ** 0.5


@given(st.integers(1, 50), st.integers(3000, 12000), STEPS)
def test_a_very_long_image_does_not_outgrow_its_area(short, long, step):
    got = fit(Size(long, short), rule(256, step=step), random=0).bucket

    assert got.width * got.height <= 256 * 256 * 2.1


@given(SIZES, rules(), SEEDS)
def test_without_a_maximum_no_more_is_cut_off_than_the_bucket_needs(original, of, seed):
    assume(of.maximum is None or not of.is_cropped)

    geometry = fit(original, of, seed)

    assert geometry.resized.width == geometry.bucket.width or geometry.resized.height == geometry.bucket.height


def test_a_wide_image_is_cropped_at_both_sides():
    geometry = fit(Size(1536, 1024), cropped(crop_style="center"), random=0)

    assert geometry == Geometry(Size(1536, 1024), Size(1536, 1024), Crop(left=256, top=0, width=1024, height=1024))


def test_corner_is_the_upper_left():
    assert fit(Size(3000, 1024), cropped(crop_style="corner"), random=5).crop == Crop(0, 0, 1024, 1024)


def test_well_known_buckets_of_a_megapixel():
    assert bucket(3000, 2000, rule(1.0, "area")) == "1216x832"
    assert bucket(2000, 3000, rule(1.0, "area")) == "832x1216"
    assert bucket(1920, 1080, rule(1.0, "area")) == "1344x768"
    assert bucket(700, 700, rule(1.0, "area")) == "1024x1024"


def test_half_a_megapixel_is_the_same_square_for_every_shape():
    square = cropped(value=0.5, unit="area", crop_style="center")

    assert [bucket(*size, square) for size in ((4000, 3000), (3000, 4000), (3000, 3000))] == ["704x704"] * 3


def test_pixel_is_the_shorter_edge():
    assert bucket(3000, 2000, rule(1024, "pixel")) == "1536x1024"
    assert bucket(2000, 3000, rule(1024, "pixel")) == "1024x1536"


def test_small_pictures_for_small_models():
    assert bucket(28, 28, rule(32, step=8)) == "32x32"
    assert bucket(400, 300, rule(64, step=4)) == "72x56"
    assert bucket(400, 300, rule(64, step=1)) == "74x55"


def test_aspect_rounding_gathers_nearly_square_images_in_one_bucket():
    assert {bucket(1000 + extra, 1000, rule(1024, step=1)) for extra in range(-4, 5)} == {"1024x1024"}
    assert bucket(1004, 1000, rule(1024, step=1, aspect_decimals=4)) == "1026x1022"


def test_a_small_image_is_enlarged():
    assert fit(Size(100, 50), rule(256), random=0).resized == Size(384, 192)


def test_an_image_over_the_maximum_is_brought_down_before_the_crop_is_taken():
    of = cropped(value=512, maximum=Measure(2048, "pixel_area"), target=Measure(1024, "pixel_area"), crop_style="center")

    assert fit(Size(4000, 4000), of, random=0).resized == Size(1024, 1024)
    assert fit(Size(4000, 1000), of, random=0).resized == Size(4000, 1000), "4 megapixels are not over 2048 x 2048"
    assert fit(Size(8000, 2000), of, random=0).resized == Size(2048, 512)
    assert fit(Size(800, 600), of, random=0).resized == Size(800, 600), "one that is not over the maximum keeps its size"
    assert fit(Size(300, 400), of, random=0).resized == Size(512, 683), "one that is too small to cover is enlarged"


def test_the_target_never_leaves_a_part_of_the_bucket_empty():
    of = cropped(value=1024, maximum=Measure(1024, "pixel_area"), target=Measure(1024, "pixel_area"))

    assert fit(Size(4000, 2000), of, random=0).resized == Size(2048, 1024)


def test_a_maximum_changes_nothing_without_crop():
    limits: dict[str, Any] = {"maximum": Measure(1.0, "area"), "target": Measure(1.0, "area")}

    assert fit(Size(4000, 2000), rule(512, **limits), random=0) == fit(Size(4000, 2000), rule(512), random=0)


def test_random_crops_reach_every_place_and_nothing_else():
    of = cropped(value=64, step=8, crop_style="random")
    lefts = Counter(fit(Size(67, 64), of, seed).crop.left for seed in range(400))

    assert set(lefts) == {0, 1, 2, 3}
    assert min(lefts.values()) > 60


@given(faces(), rules(), SEEDS)
def test_a_window_around_a_face_lies_inside_and_has_the_face_in_its_middle_or_touches_the_edge(pictured, of, seed):
    original, face = pictured
    geometry = fit(original, replace(of, is_cropped=True, crop_style="face"), seed, face)

    crop, resized = geometry.crop, geometry.resized
    assert 0 <= crop.left <= resized.width - crop.width and 0 <= crop.top <= resized.height - crop.height
    off = Fraction((2 * face.left + face.width) * resized.width, 2 * original.width) - crop.left - Fraction(crop.width, 2)
    assert abs(off) <= Fraction(1, 2) or (off < 0 and crop.left == 0) or (off > 0 and crop.left == resized.width - crop.width)


@given(faces(), rules(), SEEDS)
def test_only_the_place_of_the_crop_follows_the_face(pictured, of, seed):
    original, face = pictured
    of = replace(of, crop_style="face")

    one, other = fit(original, of, seed, face), fit(original, of, seed)

    assert (one.resized, one.bucket) == (other.resized, other.bucket)


@given(faces(), rules(), SEEDS)
def test_a_mirrored_face_mirrors_the_window_and_a_turned_one_turns_it(pictured, of, seed):
    original, face = pictured
    of = replace(of, crop_style="face", crop_aspect="preserve")
    mirrored = replace(face, left=original.width - face.left - face.width)
    turned = Face(face.top, face.left, face.height, face.width)

    one, left_right, on_its_side = fit(original, of, seed, face), fit(original, of, seed, mirrored), fit(flipped(original), of, seed, turned)

    # To the pixel, unless the middle of the face lies between two.
    assert abs(one.crop.left + left_right.crop.left - (one.resized.width - one.bucket.width)) <= 1
    assert left_right.crop.top == one.crop.top
    assert (on_its_side.crop.left, on_its_side.crop.top) == (one.crop.top, one.crop.left)


@given(SIZES, rules(), SEEDS)
def test_without_a_face_the_crop_lies_where_a_random_one_does(original, of, seed):
    assert fit(original, replace(of, crop_style="face"), seed) == fit(original, replace(of, crop_style="random"), seed)


def test_a_face_is_in_the_middle_of_the_window_where_the_image_reaches_so_far():
    of = cropped(value=512, crop_style="face", crop_aspect="square")

    assert fit(Size(3000, 1000), of, 0, Face(1000, 200, 400, 400)).crop == Crop(358, 0, 512, 512)  # 1200 of 3000 is 614.4 of 1536
    assert fit(Size(3000, 1000), of, 0, Face(0, 0, 200, 200)).crop == Crop(0, 0, 512, 512)
    assert fit(Size(3000, 1000), of, 0, Face(2900, 0, 100, 100)).crop == Crop(1024, 0, 512, 512)


def test_the_closest_aspect_is_as_many_times_wider_as_another_is_narrower():
    choices = tuple(AspectChoice(Fraction(aspect), Fraction(1)) for aspect in ("0.5", "1.0", "2.0"))
    closest = cropped(crop_aspect="closest", choices=choices)

    assert bucket(1400, 1000, closest) == "1024x1024"
    assert bucket(1430, 1000, closest) == "1472x704"
    assert bucket(1000, 1430, closest) == "704x1472"


def test_random_aspects_follow_their_weights():
    choices = (AspectChoice(Fraction("1.0"), Fraction("0.25")), AspectChoice(Fraction("0.5"), Fraction("0.75")))
    of = cropped(crop_aspect="random", choices=choices)

    drawn = Counter(str(fit(Size(1000, 1000), of, seed).bucket) for seed in range(1000))

    assert set(drawn) == {"1024x1024", "704x1472"}
    assert 200 < drawn["1024x1024"] < 300


def test_minimum_image_size_is_read_in_its_own_unit():
    assert refusal(Size(511, 4000), rule(minimum=Measure(512, "pixel"))) == "too small"
    assert refusal(Size(512, 512), rule(minimum=Measure(512, "pixel"))) is None
    assert refusal(Size(999, 1000), rule(minimum=Measure(1.0, "area"))) == "too small"
    assert refusal(Size(500, 2000), rule(minimum=Measure(1.0, "area"))) is None
    assert refusal(Size(1024, 1023), rule(minimum=Measure(1024, "pixel_area"))) == "too small"


def test_with_a_square_crop_the_shorter_edge_must_be_large_enough():
    assert refusal(Size(500, 2000), cropped(minimum=Measure(1.0, "area"))) == "too small"
    assert refusal(Size(1000, 1001), cropped(minimum=Measure(1.0, "area"))) is None


def test_aspect_limits_leave_out_what_is_beyond_them():
    of = rule(minimum_aspect=0.5, maximum_aspect=2.0)

    assert [refusal(Size(*size), of) for size in ((1, 2), (2, 1), (100, 201), (201, 100))] == [None, None, "aspect", "aspect"]


@given(SIZES, SIZES)
def test_cover_is_the_smallest_size_that_covers(original, target):
    resized = cover(original, target)

    assert resized.width >= target.width and resized.height >= target.height
    assert resized.width == target.width or resized.height == target.height
