"""From what a user wrote, in the dataset and in config.json, to the rules for geometry and captions of one dataset."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Generic, TypeVar

from simpletuner.data.backend import AspectWeight, CaptionShuffle, DatasetOptions
from simpletuner.data.captions import STRATEGIES, CaptionRule
from simpletuner.data.extras import lacking
from simpletuner.data.filters import Filter
from simpletuner.data.geometry import AspectChoice, GeometryRule, Measure, Unit
from simpletuner.data.variation import Variation
from simpletuner.errors import choose

if TYPE_CHECKING:
    from simpletuner.options.data import Data

LARGEST_EDGE = 16384
LARGEST_MEGAPIXELS = 20
USUAL_VERSIONS = 4
"""Versions of a caption with tag dropout or wildcards, which one version would hardly show."""
COLUMNS = "name it in csv_caption_column, caption_column, or parquet.caption_column of a table beside the images"
Rule = TypeVar("Rule")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Settled(Generic[Rule]):
    """A rule, or the problems because of which there is none; and what to say aloud."""

    rule: Rule | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def first(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def geometry_rule(written: DatasetOptions, options: Data, alignment_px: int) -> Settled[GeometryRule]:
    """Settle sizes and crop. A size stands in the unit of the file that it comes from."""
    problems: list[str] = []
    unit: Unit = first(written.resolution_type, options.resolution_type)

    def measure(key: str, own: float | None, general: float | None) -> Measure | None:
        found = Measure(own, unit) if own is not None else None if general is None else Measure(general, options.resolution_type)
        if found is None or (found.value == 0 and key != "resolution"):
            return None
        fault = measure_fault(found)
        if fault:
            problems.append(f"{key} is {found.value:g} in resolution_type {found.unit}: {fault}" + ("" if own is not None else " (from config.json)"))
        return found

    resolution = measure("resolution", written.resolution, options.resolution)
    minimum = measure("minimum_image_size", written.minimum_image_size, options.minimum_image_size)
    maximum = measure("maximum_image_size", written.maximum_image_size, options.maximum_image_size)
    target = measure("target_downsample_size", written.target_downsample_size, options.target_downsample_size)
    assert resolution is not None
    rule = GeometryRule(
        resolution=resolution,
        alignment_px=alignment_px,
        aspect_decimals=options.aspect_bucket_rounding,
        is_cropped=written.crop,
        crop_style=first(written.crop_style, "random") if written.crop else "center",
        crop_aspect=first(written.crop_aspect, "square"),
        choices=choices_of(written),
        minimum=minimum,
        maximum=maximum,
        target=target,
        minimum_aspect=written.minimum_aspect_ratio,
        maximum_aspect=written.maximum_aspect_ratio,
        crops=0 if options.vae_cache_disable else written.crops_per_image,
    )
    problems += [*([] if problems else size_faults(rule)), *crop_faults(written)]
    return Settled(None if problems else rule, tuple(problems), tuple(crop_notes(written, rule)))


def size_faults(rule: GeometryRule) -> list[str]:
    """Check what sizes must be to each other."""
    faults = []
    least, most = rule.minimum_aspect, rule.maximum_aspect
    if rule.resolution.area_px < rule.alignment_px**2:
        faults.append(f"resolution {rule.resolution} is less than {rule.alignment_px} px, which sides of this model's pictures are multiples of")
    if rule.maximum is not None and rule.target is None:
        faults.append("maximum_image_size needs target_downsample_size: the size to which larger images are brought")
    if rule.maximum is not None and rule.target is not None and rule.maximum.unit == rule.target.unit and rule.target.limit > rule.maximum.limit:
        faults.append(f"target_downsample_size {rule.target} is over maximum_image_size {rule.maximum}; images are brought down to it")
    if least and most and least > most:
        faults.append(f"minimum_aspect_ratio {least:g} is over maximum_aspect_ratio {most:g}")
    return faults


def measure_fault(measure: Measure) -> str | None:
    """Refuse sizes that are surely meant in another unit."""
    value = measure.value
    if not value > 0:
        return "a size is more than 0"
    if measure.unit == "area" and value >= LARGEST_MEGAPIXELS:
        return f"area is in megapixels, under {LARGEST_MEGAPIXELS}; for an edge in pixels write resolution_type pixel_area"
    if measure.unit == "area":
        return None
    if value != round(value):
        return "pixels are whole; for megapixels write resolution_type area"
    if value < 8:
        return "this is an edge in pixels; for megapixels write resolution_type area"
    return f"this is an edge in pixels, {LARGEST_EDGE} at most" if value > LARGEST_EDGE else None


def crop_faults(written: DatasetOptions) -> list[str]:
    """Check what belongs together in a crop."""
    faults = [*lacking("cv2", "faces", "crop_style 'face'")] if written.crop and written.crop_style == "face" else []
    wants = written.crop and written.crop_aspect in ("closest", "random")
    if wants and not written.crop_aspect_buckets:
        faults.append(f"crop_aspect {written.crop_aspect!r} needs crop_aspect_buckets: a list of widths over heights, such as [1.0, 0.75, 1.33]")
    weighted = [choice for choice in written.crop_aspect_buckets if isinstance(choice, AspectWeight)]
    plain = [choice for choice in written.crop_aspect_buckets if not isinstance(choice, AspectWeight)]
    if weighted and plain:
        faults.append("crop_aspect_buckets mixes plain aspects with weighted ones; weigh all or none")
    elif weighted and abs(sum(choice.weight for choice in weighted) - 1) > 1e-6:
        faults.append(f"crop_aspect_buckets has weights that add up to {sum(choice.weight for choice in weighted):g}; they must add up to 1")
    if any(not 0 < aspect <= 100 for aspect in plain):
        faults.append("crop_aspect_buckets holds an aspect that is not width over height, more than 0 and 100 at most")
    return faults


def choices_of(written: DatasetOptions) -> tuple[AspectChoice, ...]:
    """The aspects to choose from, as exact fractions of what was written."""
    pairs = [(choice.aspect, choice.weight) if isinstance(choice, AspectWeight) else (choice, 1.0) for choice in written.crop_aspect_buckets]
    return tuple(AspectChoice(Fraction(str(aspect)), Fraction(str(weight))) for aspect, weight in pairs)


def crop_notes(written: DatasetOptions, rule: GeometryRule) -> list[str]:
    """Name what has no effect."""
    if not written.crop:
        idle = {
            "crop_style": written.crop_style not in (None, "center"),
            "crop_aspect": written.crop_aspect not in (None, "preserve"),
            "crop_aspect_buckets": bool(written.crop_aspect_buckets),
            "crops_per_image": written.crops_per_image > 1,
            "maximum_image_size": rule.maximum is not None,
            "target_downsample_size": rule.target is not None,
        }
        asked = [key for key, is_asked in idle.items() if is_asked]
        return [f"{', '.join(asked)} without effect: crop is off, so a picture keeps its own shape"] if asked else []
    notes = []
    if written.crop_aspect_buckets and written.crop_aspect not in ("closest", "random"):
        notes.append("crop_aspect_buckets without effect: crop_aspect is not 'closest' or 'random'")
    if written.crops_per_image > 1 and rule.crop_style != "random":
        notes.append("crops_per_image without effect: crop_style is not 'random', so all crops of an image are the same")
    elif written.crops_per_image > 1 and rule.crops == 0:
        notes.append("crops_per_image without effect: with vae_cache_disable each draw takes a crop of its own")
    if rule.target is not None and rule.maximum is None:
        notes.append("target_downsample_size without effect: there is no maximum_image_size")
    return notes


def caption_rule(written: DatasetOptions, options: Data) -> Settled[CaptionRule]:
    """Settle where captions come from."""
    strategy = first(written.caption_strategy, options.caption_strategy)
    strategy = "instanceprompt" if strategy == "instance_prompt" else strategy
    prompts = first(written.instance_prompt, (options.instance_prompt,) if options.instance_prompt else ())
    problems, notes = [], []
    if strategy not in STRATEGIES:
        problems.append(f"caption_strategy is {strategy!r}; {choose(strategy, STRATEGIES, 'caption strategies')}")
    only = first(written.only_instance_prompt, options.only_instance_prompt)
    prepends = first(written.prepend_instance_prompt, options.prepend_instance_prompt)
    if only:
        strategy = "instanceprompt"
    wants = {
        "only_instance_prompt": only,
        "prepend_instance_prompt": prepends,
        "caption_strategy 'instanceprompt'": strategy == "instanceprompt",
    }
    asked = [key for key, is_asked in wants.items() if is_asked]
    if asked and not prompts:
        problems.append(f"{asked[0]} needs instance_prompt: the words to use")
    if not problems and STRATEGIES[strategy].is_of_place and not written.knows_captions:
        problems.append(f"caption_strategy is {strategy!r}, but {written.type!r} knows no captions without a column that holds them; {COLUMNS}")
    if problems:
        return Settled(None, tuple(problems))
    if written.knows_captions and written.caption_strategy is None and not STRATEGIES[strategy].is_of_place and not only:
        notes.append(f"captions come from {strategy}, as config.json has it; write caption_strategy to take those that this place knows")
    if written.instance_prompt and not prepends and not STRATEGIES[strategy].needs_prompt:
        notes.append(f"instance_prompt without effect: captions come from {strategy}; use prepend_instance_prompt or only_instance_prompt")
    rule = CaptionRule(strategy=strategy, instance_prompts=tuple(prompts), prepends_prompt=prepends, splits_lines=not written.disable_multiline_split)
    return Settled(rule, (), tuple(notes))


def variation_rule(written: DatasetOptions, rule: CaptionRule, filters: tuple[Filter, ...], options: Data) -> tuple[Variation | None, list[str]]:
    """Settle in which versions captions are trained, and what to say aloud; None if each is trained as it is."""
    asked = first(written.caption_shuffle, CaptionShuffle(enable=False))
    has_more = bool(written.caption_tag_dropout or written.caption_wildcards)
    notes = variation_notes(written, asked, options)
    if not (asked.enable or has_more or filters):
        return None, notes
    begins = rule.prepends_prompt and not STRATEGIES[rule.strategy].needs_prompt
    variation = Variation(
        count=first(asked.count, USUAL_VERSIONS if has_more else 1),
        seed=asked.seed,
        shuffles=asked.enable,
        separator=asked.split_on,
        kept_tags=asked.position_start,
        includes_original=asked.include_original,
        tag_dropout=written.caption_tag_dropout,
        has_wildcards=written.caption_wildcards,
        filters=filters,
        heads=tuple(prompt.strip() for prompt in rule.instance_prompts if prompt.strip()) if begins else (),
    )
    if asked.enable and not has_more and len(variation.numbers) == 1:
        notes.append("caption_shuffle gives each caption one other order, for good: raise count, or let include_original be true")
    return variation, notes


def variation_notes(written: DatasetOptions, asked: CaptionShuffle, options: Data) -> list[str]:
    """Name what has no effect on captions."""
    on = {
        "caption_shuffle": asked.enable,
        "caption_tag_dropout": written.caption_tag_dropout > 0,
        "caption_wildcards": written.caption_wildcards,
    }
    keys = [key for key, is_on in on.items() if is_on]
    if not keys:
        return []
    if options.caption_dropout_probability == 1:
        return [f"{', '.join(keys)} without effect: caption_dropout_probability is 1, so no caption is ever shown"]
    notes = []
    if keys == ["caption_wildcards"]:
        idle = [key for key in ("split_on", "position_start", "include_original") if key in asked.model_fields_set]
        notes += [f"{', '.join(idle)} of caption_shuffle without effect: tags are neither shuffled nor dropped"] if idle else []
    if written.caption_tag_dropout == 1:
        notes.append("caption_tag_dropout is 1: no version but the original has any tag behind those that are kept")
    return notes
