"""The report as one page that needs neither network nor server: thumbnails with their crops, of a bounded number and size."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from typing import Any

from simpletuner.console import Console
from simpletuner.data.backend import DataBackend
from simpletuner.data.doctor.findings import Beside, Examined, Problem, Report, kind_of, percent
from simpletuner.data.doctor.looks import in_threads
from simpletuner.data.doctor.table import size_of, verdict
from simpletuner.data.faults import RULES
from simpletuner.data.images import BLACK, WHITE, decode_rgb
from simpletuner.data.window import ALWAYS
from simpletuner.errors import DatasetError
from simpletuner.types import Sample

THUMBNAILS = 400
"""Of all datasets together; images with problems come first in every bucket."""
CARDS = 2000
"""Images that are shown at all; those beyond `THUMBNAILS` without a picture, and only if something is wrong with them."""
THUMBNAIL_PX = 224
THUMBNAIL_BYTES = 16_000
QUALITIES = (78, 60, 40, 20)
"""JPEG qualities that are tried in turn until a thumbnail is small enough; the last one is taken as it is."""
CAPTION_LETTERS = 2000
CAPTIONS_SHOWN = 8
NAMES_SHOWN = 200
PAIRS_SHOWN = 12
"""Pictures that are shown beside their mask or reference, of each conditioning dataset: those of black masks first."""
EXAMPLES_SHOWN = 3

Key = tuple[str, str]
"""Dataset and name of an image."""


def page(report: Report, console: Console) -> str:
    """The whole page.

    Args:
        console: shows a bar while thumbnails are made.
    """
    chosen = choose_images(report)
    pictured = set(chosen[:THUMBNAILS])
    thumbnails: dict[Key, str] = {}
    with console.bar("thumbnails", len(pictured)) as bar:
        for one in report.datasets:
            mine = [name for dataset, name in pictured if dataset == one.id]
            for name, picture in zip(mine, pictures(one.dataset.open(), mine)):
                bar.advance()
                if picture:
                    thumbnails[one.id, name] = picture
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    content = json.dumps(content_of(report, set(chosen), thumbnails), ensure_ascii=False, separators=(",", ":"))
    # Inside a script no text but "<" can end it; JSON writes that letter so, too.
    return template.replace("{{report}}", content.replace("<", "\\u003c"))


def choose_images(report: Report) -> list[Key]:
    """The images to show: buckets take turns, and in each bucket images with and without problems do."""
    queues = [list(queue_of(one, bucket.size)) for one in report.datasets for bucket in one.buckets]
    turns = [key for turn in zip_longest(*queues) for key in turn if key is not None]
    complained = {(one.id, name) for one in report.datasets for name in one.complaints}
    rest = [key for key in turns[THUMBNAILS:] if key in complained]
    return turns[:THUMBNAILS] + rest[: CARDS - THUMBNAILS]


def queue_of(one: Examined, size: object) -> Iterator[Key]:
    """The images of a bucket, the worst and the plain ones by turns."""
    names = [sample.name for sample in one.samples if sample.geometry.bucket == size]
    bad = sorted((name for name in names if name in one.complaints), key=lambda name: -worst(one, name))
    plain = [name for name in names if name not in one.complaints]
    for turn in zip_longest(bad, plain):
        yield from ((one.id, name) for name in turn if name is not None)


def worst(one: Examined, name: str) -> int:
    """How bad the worst complaint about an image is."""
    order = ("note", "warning", "error")
    return max(order.index(kind_of(complaint.kind).severity) for complaint in one.complaints[name])


def pictures(backend: DataBackend, names: Sequence[str], ground: int = WHITE) -> Iterator[str]:
    """Thumbnails as text; empty for an image that cannot be decoded.

    Args:
        ground: the grey that lies under what is transparent.
    """

    def draw(name: str) -> str:
        try:
            image = decode_rgb(backend.read(name), name, THUMBNAIL_PX, ground)
        except DatasetError:
            return ""
        data = b""
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            data = buffer.getvalue()
            if len(data) <= THUMBNAIL_BYTES:
                break
        return base64.b64encode(data).decode("ascii")

    return in_threads(names, draw)


def content_of(report: Report, chosen: set[Key], thumbnails: Mapping[Key, str]) -> dict[str, Any]:
    """What the page's script reads."""
    totals = report.totals
    kinds = {complaint.kind for one in report.datasets for complaints in one.complaints.values() for complaint in complaints}
    return {
        "source": report.source,
        "usable": report.is_usable,
        "verdict": verdict(report),
        "tiles": [
            ["images", f"{totals['images']:,.0f}"],
            ["skipped", f"{totals['skipped']:,.0f}"],
            ["steps an epoch", f"{totals['steps_per_epoch']:,.10g}"],
            ["steps of the run", f"{totals['steps']:,.0f}"],
            ["images a step", f"{totals['images_per_step']:,.0f}"],
            ["latents on disk", size_of(totals["latent_cache_bytes"])],
            ["text on disk", size_of(totals["text_cache_bytes"])],
        ],
        "assumed": list(report.assumed),
        "kinds": {kind: kind_of(kind).severity for kind in sorted(kinds)},
        "skipped": {rule: True for one in report.datasets for rule in one.skipped},
        "problems": [problem_of(problem) for problem in report.problems],
        "datasets": [dataset_of(one, chosen, thumbnails) for one in report.datasets],
        "conditioning": [beside_of(one, report.datasets) for one in report.conditioning],
    }


def problem_of(problem: Problem) -> dict[str, Any]:
    examples = "; ".join((*problem.examples[:EXAMPLES_SHOWN], *(("...",) if len(problem.examples) > EXAMPLES_SHOWN else ())))
    return {
        "kind": problem.kind,
        "severity": problem.severity,
        "dataset": problem.dataset,
        "message": f"{problem.message} ({examples})" if examples else problem.message,
        "hint": problem.hint,
        "count": len(problem.files),
    }


def dataset_of(one: Examined, chosen: set[Key], thumbnails: Mapping[Key, str]) -> dict[str, Any]:
    """One dataset as the page shows it."""
    repeats = one.dataset.repeats + 1
    shown = [sample for sample in one.samples if (one.id, sample.name) in chosen]
    return {
        "id": one.id,
        "is_eval": one.dataset.is_eval,
        "about": one.dataset.describe().removeprefix(f"{one.id}: "),
        "error": one.error,
        "facts": facts_of(one) if one.error is None else [],
        "notes": list(one.notes),
        "skipped": [
            {"rule": rule, "why": RULES.get(rule, rule), "count": len(names), "names": list(names[:NAMES_SHOWN])}
            for rule, names in one.skipped.items()
        ],
        "buckets": [
            {"size": str(row.size), "images": row.images, "draws": row.images * repeats, "batches": row.batches, "last_batch": row.last_batch}
            for row in one.buckets
        ],
        "images": [image_of(one, sample, thumbnails.get((one.id, sample.name))) for sample in shown],
    }


def beside_of(one: Beside, datasets: Sequence[Examined]) -> dict[str, Any]:
    """One conditioning dataset as the page shows it, with a few pictures beside their masks or references."""
    facts = [
        ("files", f"{one.files:,}"),
        ("in use", f"{len({pair.file for pair in one.pairs}):,}"),
        ("without a picture", f"{len(one.without_picture):,}"),
        ("pictures without a file", f"{one.count_lacking:,}"),
    ]
    lists = [("all black", one.black), ("without a picture", one.without_picture)]
    lists += [(f"without a file, in {name}", names) for name, names in one.lacking.items()]
    return {
        "id": one.id,
        "kind": one.conditioning.kind,
        "about": one.conditioning.describe().removeprefix(f"{one.id}: "),
        "error": one.error,
        "facts": facts + ([("all black", f"{len(one.black):,}")] if one.conditioning.is_mask else []),
        "lists": [{"title": title, "count": len(names), "names": list(names[:NAMES_SHOWN])} for title, names in lists if names],
        "notes": list(one.notes),
        "pairs": pairs_of(one, datasets),
    }


def pairs_of(one: Beside, datasets: Sequence[Examined]) -> list[dict[str, Any]]:
    """The first pairs of a conditioning dataset with a thumbnail of either side, black masks before others."""
    black = set(one.black)
    shown = sorted(one.pairs, key=lambda pair: pair.file not in black)[:PAIRS_SHOWN]
    besides = pictures(one.conditioning.open(), [pair.file for pair in shown], BLACK if one.conditioning.is_mask else WHITE)
    backends = {each.id: each.dataset.open() for each in datasets}
    return [
        {
            "picture": pair.picture,
            "file": pair.file,
            "is_black": pair.file in black,
            "thumbnails": [next(pictures(backends[pair.dataset], [pair.picture])), beside],
        }
        for pair, beside in zip(shown, besides)
    ]


def facts_of(one: Examined) -> list[tuple[str, str]]:
    """Figures of a dataset with their names."""
    figures = one.figures
    facts = [
        ("images", f"{len(one.samples):,}"),
        ("skipped", f"{one.count_skipped:,}"),
        ("of the pixels are cut away", percent(figures["cropped_share"])),
        ("width / height", f"{figures['narrowest_aspect']:.2f} to {figures['widest_aspect']:.2f}"),
        ("tokens in the longest caption", f"{figures['longest_caption_tokens']:,.0f}"),
        ("of latents on disk", size_of(figures["latent_cache_bytes"])),
    ]
    if not one.dataset.is_eval:
        batches = f"{figures['batches']:,.0f}" + (f", {figures['partial_batches']:,.0f} not full" if figures["partial_batches"] else "")
        facts[2:2] = [("of all draws", percent(figures["share_of_draws"])), ("batches an epoch", batches)]
        if one.dataset.window != ALWAYS:
            facts[4:4] = [(f"batches of the run, in {one.dataset.window}", f"{figures['batches_of_run']:,.0f}")]
    return facts


def image_of(one: Examined, sample: Sample, thumbnail: str | None) -> dict[str, Any]:
    """One image as the page shows it."""
    geometry = sample.geometry
    crop = geometry.crop
    complaints = one.complaints.get(sample.name, ())
    return {
        "file": sample.name,
        "original": [geometry.original.width, geometry.original.height],
        "resized": [geometry.resized.width, geometry.resized.height],
        "crop": [crop.left, crop.top, crop.width, crop.height],
        "bucket": str(geometry.bucket),
        "captions": [caption[:CAPTION_LETTERS] for caption in sample.captions[:CAPTIONS_SHOWN]],
        "problems": [[complaint.kind, complaint.detail] for complaint in complaints],
        **({"thumbnail": thumbnail} if thumbnail else {}),
    }
