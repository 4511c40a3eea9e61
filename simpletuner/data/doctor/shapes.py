"""What becomes of images on their way into buckets: cut, enlarged, batched, cached.

Letters: C latent channels, h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from simpletuner.data.buckets import Group, by_bucket
from simpletuner.data.doctor.findings import BucketRow, Chart, ModelFacts, named, percent
from simpletuner.types import Geometry, Sample

ENLARGED = 1.5
"""Times that an image may be enlarged before it is a warning: from here on, blur is learned."""
CUT_SHARE = 0.3
"""Share of the resized image that may fall away before it is a warning."""
EXTREME_ASPECT = 3.0
FLOAT_BYTES = 4
MOMENTS = 2
"""Mean and deviation of each latent number are kept."""


def bucket_rows(group: Group, batch_size: int) -> tuple[BucketRow, ...]:
    """The histogram of one dataset, the fullest bucket first."""
    size = group.batch_size or batch_size
    rows = []
    for bucket, samples in by_bucket(group.samples).items():
        draws = len(samples) * (group.repeats + 1)
        rows.append(BucketRow(bucket, len(samples), math.ceil(draws / size), size, draws % size))
    return tuple(sorted(rows, key=lambda row: (-row.images, row.size.width, row.size.height)))


def enlargement(geometry: Geometry) -> float:
    """How many times an image is enlarged; 1 if it is not."""
    return max(1.0, geometry.resized.width / geometry.original.width, geometry.resized.height / geometry.original.height)


def cut_share(geometry: Geometry) -> float:
    """Share of the resized image that the crop leaves away."""
    return 1 - geometry.crop.width * geometry.crop.height / (geometry.resized.width * geometry.resized.height)


def total_cut_share(samples: Iterable[Sample]) -> float:
    """The same for all of a dataset's pixels."""
    kept = resized = 0
    for sample in samples:
        kept += sample.geometry.crop.width * sample.geometry.crop.height
        resized += sample.geometry.resized.width * sample.geometry.resized.height
    return 1 - kept / resized if resized else 0.0


def check_shapes(samples: Sequence[Sample], chart: Chart) -> None:
    """Note images that are enlarged, cut or unusually long."""
    factors = {sample.name: enlargement(sample.geometry) for sample in samples}
    note_enlarged("enlarged", {name: factor for name, factor in factors.items() if factor >= ENLARGED}, f"{ENLARGED:g} times or more", chart)
    note_enlarged("slightly enlarged", {name: factor for name, factor in factors.items() if 1 < factor < ENLARGED}, "a little", chart)
    cut = {sample.name: share for sample in samples if (share := cut_share(sample.geometry)) > CUT_SHARE}
    if cut:
        worst = max(cut, key=lambda name: cut[name])
        message = (
            f"{named(len(cut), 'image loses', 'images lose')} more than {percent(CUT_SHARE)} to the crop, the most {percent(cut[worst])} ({worst})"
        )
        chart.note("cropped away", {name: f"{percent(share)} of it" for name, share in cut.items()}, message)
    check_aspects(samples, chart)


def note_enlarged(kind: str, factors: Mapping[str, float], how: str, chart: Chart) -> None:
    """Note images that are enlarged so much."""
    if factors:
        worst = max(factors, key=lambda name: factors[name])
        message = f"{named(len(factors), 'image')} enlarged {how}, the most {factors[worst]:.2f} times ({worst})"
        chart.note(kind, {name: f"{factor:.2f} times" for name, factor in factors.items()}, message)


def check_aspects(samples: Sequence[Sample], chart: Chart) -> None:
    """Note images more than three times as long as they are narrow."""
    aspects = {sample.name: sample.geometry.original.width / sample.geometry.original.height for sample in samples}
    extreme = {name: f"{aspect:.2f} wide to 1 high" for name, aspect in aspects.items() if max(aspect, 1 / aspect) > EXTREME_ASPECT}
    message = f"{named(len(extreme), 'image')} more than {EXTREME_ASPECT:g} times as long as narrow"
    chart.note("extreme aspect", extreme, message)


def check_buckets(rows: Sequence[BucketRow], chart: Chart) -> None:
    """Note buckets whose draws never fill a batch."""
    lone = {row.size for row in rows if row.batches == 1 and row.last_batch}
    if not lone:
        return
    concerned = sum(row.images for row in rows if row.size in lone)
    message = (
        f"{len(lone)} of {named(len(rows), 'bucket')} never {'fills' if len(lone) == 1 else 'fill'} a batch of {rows[0].batch_size}, repeats counted"
    )
    chart.note_all("lone bucket", message, share=concerned / sum(row.images for row in rows))


def latent_bytes(samples: Iterable[tuple[str, Sample]], model: ModelFacts) -> int:
    """Expected size of the latents of images, each kind of picture once: 2 x C x h x w numbers for each of its crops.

    Args:
        samples: each with the digest of its bytes.
    """
    total = 0
    for geometry, crops in {(content, sample.geometry): (sample.geometry, sample.crops) for content, sample in samples}.values():
        height, width = geometry.crop.height // model.stride_px, geometry.crop.width // model.stride_px
        total += MOMENTS * model.latent_channels * height * width * FLOAT_BYTES * max(1, crops)
    return total
