"""The report for programs: what was found, of every image, as plain objects."""

from __future__ import annotations

from typing import Any

from simpletuner.data.doctor.examine import counts_of
from simpletuner.data.doctor.findings import Beside, Complaint, Examined, Problem, Report
from simpletuner.data.faults import RULES
from simpletuner.types import Sample


def as_json(report: Report) -> dict[str, Any]:
    """Everything, in lists, texts and numbers."""
    return {
        "config": report.source,
        "usable": report.is_usable,
        "totals": dict(report.totals),
        "assumed": list(report.assumed),
        "problems": [problem_object(problem) for problem in report.problems],
        "backends": [backend_object(one) for one in report.datasets],
        "conditioning": [beside_object(one) for one in report.conditioning],
    }


def problem_object(problem: Problem) -> dict[str, Any]:
    return {
        "kind": problem.kind,
        "severity": problem.severity,
        "weight": round(problem.weight, 4),
        "dataset": problem.dataset,
        "message": problem.message,
        "hint": problem.hint,
        "files": list(problem.files),
        "examples": list(problem.examples),
    }


def backend_object(one: Examined) -> dict[str, Any]:
    """One dataset. `images` are those that are trained on; `skipped` are files that are not, which have no size to tell."""
    return {
        "id": one.id,
        "type": one.dataset.options.type,
        "place": one.dataset.open().place,
        "is_eval": one.dataset.is_eval,
        "repeats": one.dataset.repeats,
        "takes_part": str(one.dataset.window) or "always",
        "error": one.error,
        "counts": counts_of(one),
        "figures": dict(one.figures),
        "buckets": {
            str(row.size): {"images": row.images, "batches": row.batches, "batch_size": row.batch_size, "last_batch": row.last_batch}
            for row in one.buckets
        },
        "images": [image_object(sample, one.complaints.get(sample.name, ())) for sample in one.samples],
        "skipped": [{"file": name, "rule": rule, "why": RULES.get(rule, rule)} for rule, names in one.skipped.items() for name in names],
        "notes": list(one.notes),
    }


def beside_object(one: Beside) -> dict[str, Any]:
    """One conditioning dataset: which of its files goes along with which picture, and what is left over on either side."""
    return {
        "id": one.id,
        "kind": one.conditioning.kind,
        "of": list(one.conditioning.sources),
        "place": one.conditioning.open().place,
        "error": one.error,
        "files": one.files,
        "pairs": [{"dataset": pair.dataset, "picture": pair.picture, "file": pair.file} for pair in one.pairs],
        "without_picture": list(one.without_picture),
        "pictures_without_file": {name: list(pictures) for name, pictures in one.lacking.items()},
        "black": list(one.black),
        "notes": list(one.notes),
    }


def image_object(sample: Sample, complaints: tuple[Complaint, ...]) -> dict[str, Any]:
    """One image: sizes as [width, height], the crop as [left, top, width, height] within the resized image."""
    geometry = sample.geometry
    crop = geometry.crop
    return {
        "file": sample.name,
        "original": [geometry.original.width, geometry.original.height],
        "resized": [geometry.resized.width, geometry.resized.height],
        "crop": [crop.left, crop.top, crop.width, crop.height],
        "bucket": str(geometry.bucket),
        "captions": list(sample.captions),
        "problems": [str(complaint) for complaint in complaints],
    }
