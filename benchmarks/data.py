"""What the data room costs: the index, the latent cache, reading batches, and a million samples; ratios within one run.

    python benchmarks/data.py [--quick] [--only index caching loading scale] [--json FILE]

Everything is made on the spot, nothing is downloaded. Each pair that is compared is measured in turns, round by round, on the same
threads; the table shows the median over rounds and the extremes. On a noisy machine look at these before you believe the median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

ROOT = Path(__file__).parents[1]
DISTINCT = 20
"""Different pictures among those that are indexed; the others are further names of the same files, to spare the disk."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    indexed: int = 10_000
    decoded: int = 100
    picture: tuple[int, int] = (3000, 2000)
    encoded: int = 24
    encoded_px: int = 512
    encoder_channels: tuple[int, ...] = (32, 64, 64, 64)
    batches: int = 8
    trained_px: int = 256
    layers: int = 16
    """16 layers of width 512 are 50 M parameters."""
    samples: int = 1_000_000
    rounds: int = 5


QUICK = Sizes(
    indexed=60,
    decoded=10,
    picture=(300, 200),
    encoded=6,
    encoded_px=64,
    encoder_channels=(32, 32, 32, 32),
    batches=4,
    trained_px=64,
    layers=1,
    samples=2_000,
    rounds=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; the figures mean nothing")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    if arguments.start:
        print(json.dumps(start_a_million(arguments.start, sizes.samples)))
        return
    figures: dict[str, dict[str, object]] = {
        "machine": {"python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count()}
    }
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = PARTS[name](Path(folder), sizes)
        print("\n".join(TABLE[name]).format(**figures[name]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def turns(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> dict[str, float]:
    """Measure two things in turns; the first round is thrown away. Gives the medians, and of the ratio theirs / ours the extremes."""
    pairs = [(ours(), theirs()) for _ in range(rounds + 1)][1:]
    ratios = sorted(second / first for first, second in pairs)
    return {
        "ours": statistics.median(first for first, _ in pairs),
        "theirs": statistics.median(second for _, second in pairs),
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
    }


def save_picture(path: Path, width: int, height: int, seed: int) -> None:
    """A picture with the detail of a photograph: soft shapes, and noise of which JPEG keeps a part. Some 2 MB at 6 megapixels."""
    random = numpy.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 200, (12, 18, 3), dtype=numpy.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.normal(0, 7, (height, width, 1))
    Image.fromarray(numpy.clip(numpy.asarray(soft) + noise, 0, 255).astype(numpy.uint8)).save(path, quality=92)


def dataset_of(folder: Path, width: int, backend_type: type | None = None):
    """A planned dataset over a folder, or over a place of another kind."""
    from simpletuner.data.backends.local import LocalBackend, LocalOptions
    from simpletuner.data.cache_place import LocalPlace
    from simpletuner.data.captions import CaptionRule
    from simpletuner.data.geometry import GeometryRule, Measure
    from simpletuner.data.plan import ImageDataset

    rule = GeometryRule(Measure(width, "pixel_area"), alignment_px=64 if width >= 256 else 8, aspect_decimals=2, is_cropped=False)
    options = LocalOptions(id="pictures", instance_data_dir=str(folder / "pictures"))
    places = (LocalPlace(folder / "latents"), LocalPlace(folder / "text"))
    return ImageDataset("pictures", backend_type or LocalBackend, options, rule, CaptionRule("filename"), 0, 1.0, *places)


def measure_index(folder: Path, sizes: Sizes) -> dict[str, object]:
    """Index a folder from nothing, and decode its images, both on the threads that the index takes; then start again."""
    from simpletuner.console import Console
    from simpletuner.data.discover import discover

    (folder / "pictures").mkdir()
    for number in range(sizes.indexed):
        path = folder / "pictures" / f"picture_{number:06}.jpg"
        if number < DISTINCT:
            save_picture(path, *sizes.picture, seed=number)
        else:
            os.link(folder / "pictures" / f"picture_{number % DISTINCT:06}.jpg", path)
    dataset, quiet = dataset_of(folder, 1024), Console(is_main=False)
    paths = sorted((folder / "pictures").iterdir())[: sizes.decoded]
    runs = iter(range(1_000_000))

    def cold() -> float:
        began = time.perf_counter()
        found = discover(dataset, folder / f"index-{next(runs)}", 0, quiet)
        assert len(found.samples) == sizes.indexed
        return (time.perf_counter() - began) / sizes.indexed

    def decode() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            list(pool.map(lambda path: Image.open(path).load(), paths))
        return (time.perf_counter() - began) / len(paths)

    figures: dict[str, object] = {**turns(sizes.rounds, cold, decode)}
    warm = []
    for _ in range(sizes.rounds):
        began = time.perf_counter()
        discover(dataset, folder / "index-0", 0, quiet)
        warm.append(time.perf_counter() - began)
    return {**figures, "images": sizes.indexed, "picture": "x".join(map(str, sizes.picture)), "warm_seconds": statistics.median(warm)}


def measure_caching(folder: Path, sizes: Sizes) -> dict[str, object]:
    """Fill a cache from files, and encode as many pictures that lie in memory; the encoder has one thread, as if it were a device."""
    import torch
    from diffusers import AutoencoderKL

    from simpletuner.console import Console
    from simpletuner.data.contents import ContentBook, ImageReader
    from simpletuner.data.discover import discover
    from simpletuner.data.latents import LatentCache
    from simpletuner.data.store import Store

    torch.set_num_threads(1)
    torch.manual_seed(0)
    depth = len(sizes.encoder_channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    vae = AutoencoderKL(**blocks, block_out_channels=sizes.encoder_channels, layers_per_block=1, latent_channels=4).eval()
    (folder / "pictures").mkdir()
    for number in range(sizes.encoded):
        save_picture(folder / "pictures" / f"picture_{number:06}.jpg", *sizes.picture, seed=number)
    dataset = dataset_of(folder, sizes.encoded_px)
    samples = discover(dataset, folder / "index", 0, Console(is_main=False)).samples
    bucket, size = samples[0].geometry.bucket, 4
    ready = [torch.rand(size, 3, bucket.height, bucket.width) * 2 - 1 for _ in range(sizes.encoded // size)]

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = vae.encode(pixels).latent_dist
        return {"mean": answer.mean, "std": answer.std}

    runs = iter(range(1_000_000))

    def pipeline() -> float:
        images = ImageReader({"pictures": dataset.open()}, ContentBook(folder / "index"))
        cache = LatentCache(Store(folder / f"latents-{next(runs)}"), encode, "vae", images, size, warn=print)
        began = time.perf_counter()
        cache.fill(samples)
        return len(samples) / (time.perf_counter() - began)

    def alone() -> float:
        began = time.perf_counter()
        for pixels in ready:
            encode(pixels)
        return len(ready) * size / (time.perf_counter() - began)

    found = turns(min(sizes.rounds, 3), alone, pipeline)
    return {
        "alone": found["ours"],
        "pipeline": found["theirs"],
        **{key: found[key] for key in ("ratio", "least", "most")},
        "images": len(samples),
        "picture": "x".join(map(str, sizes.picture)),
        "bucket": str(bucket),
    }


def measure_loading(folder: Path, sizes: Sizes) -> dict[str, object]:
    """Train a model on batches from the cache, and on one batch that lies in memory."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))  # all but one core: threads that wait for each other measure the queue
    loader, first = cached_batches(folder, sizes)
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Linear(16, 512), torch.nn.TransformerEncoder(layer, sizes.layers), torch.nn.Linear(512, 16))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    waits: list[float] = []

    def step(latents: torch.Tensor) -> None:
        patches = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)  # (B, 256, 16)
        (model(patches) - patches).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def fed() -> float:
        batches = loader.iterate(count=sizes.batches + 2)
        for _ in range(2):  # the first batches cannot have been read ahead of anything
            step(next(batches).latents["mean"])
        began = time.perf_counter()
        for _ in range(sizes.batches):
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            step(batch.latents["mean"])
        taken = (time.perf_counter() - began) / sizes.batches
        batches.close()
        return taken

    def in_memory() -> float:
        step(first), step(first)
        began = time.perf_counter()
        for _ in range(sizes.batches):
            step(first)
        return (time.perf_counter() - began) / sizes.batches

    def at_once() -> float:
        began = time.perf_counter()
        for position in range(sizes.batches):
            loader.batch_at(position)
        return (time.perf_counter() - began) / sizes.batches

    found = turns(sizes.rounds, in_memory, fed)
    whole = statistics.median(at_once() for _ in range(sizes.rounds)) / found["ours"]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fed": found["theirs"],
        "in_memory": found["ours"],
        **{key: found[key] for key in ("ratio", "least", "most")},
        "cost_share": whole,
        "wait_share": statistics.median(waits) / found["theirs"],
        "worst_wait_seconds": max(waits),
    }


def cached_batches(folder: Path, sizes: Sizes):
    """A loader over latents of pictures and embeddings of 256 tokens, two a batch, and the latents of one batch."""
    import torch

    from simpletuner.data.buckets import Group
    from simpletuner.data.embeds import EmbedCache
    from simpletuner.data.latents import LatentCache
    from simpletuner.data.loader import Loader
    from simpletuner.data.sampler import Sampler
    from simpletuner.data.store import Store
    from simpletuner.types import Crop, Geometry, Sample, Size
    from tests.builders.images import MadeImages

    edge, size = sizes.trained_px, 2
    geometry = Geometry(Size(edge, edge), Size(edge, edge), Crop(0, 0, edge, edge))
    samples = [
        Sample("pictures", f"{number:04}.png", f"{number:032x}", geometry, (f"picture {number}",)) for number in range((sizes.batches + 2) * size)
    ]

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        means = torch.nn.functional.avg_pool2d(pixels[:, [0, 1, 2, 0]], 8)
        return {"mean": means, "std": means.abs() * 0.1}

    latents = LatentCache(Store(folder / "latents"), encode, "vae", MadeImages(lambda sample: torch.rand(3, edge, edge)), 4, warn=print)
    latents.fill(samples)
    embeds = EmbedCache(Store(folder / "text"), lambda prompts: {"prompt": torch.rand(len(prompts), 256, 768)}, "text", 4, warn=print)
    embeds.fill([caption for sample in samples for caption in sample.captions])
    loader = Loader(Sampler([Group("pictures", samples)], size, 0), latents, embeds, caption_dropout=0.0, seed=0)
    return loader, loader.batch_at(0).latents["mean"]


def measure_scale(folder: Path, sizes: Sizes) -> dict[str, object]:
    """Start on a million samples whose index is there, each time in a new process."""
    command = [sys.executable, __file__, "--start", str(folder), *(["--quick"] if sizes is QUICK else [])]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(min(sizes.rounds, 3) + 1)][1:]
    seconds = sorted(run["seconds"] for run in runs)
    return {
        "samples": sizes.samples,
        "seconds": statistics.median(seconds),
        "least": seconds[0],
        "most": seconds[-1],
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "memory_mb": max(run["memory_mb"] for run in runs),
        "memory_at_start_mb": max(run["memory_at_start_mb"] for run in runs),
        "parts": {name: statistics.median(run["parts"][name] for run in runs) for name in runs[0]["parts"]},
    }


def start_a_million(folder: Path, samples: int) -> dict[str, object]:
    """Find the samples, sort them into buckets, and give the first batch; seconds and peak memory of this process."""
    from simpletuner.console import Console
    from simpletuner.data.backend import Entry
    from simpletuner.data.backends.local import LocalBackend
    from simpletuner.data.buckets import Group, describe
    from simpletuner.data.discover import discover
    from simpletuner.data.sampler import Sampler
    from simpletuner.types import Size

    class Listed(LocalBackend):
        """A place that knows the sizes of its images, in 40 shapes."""

        def list(self) -> Iterator[Entry]:
            shapes = [Size(640 + 32 * (number % 20), 640 + 32 * (number // 2)) for number in range(40)]
            for number in range(samples):
                yield Entry(f"folder_{number // 1000:04}/a_picture_of_something_{number:07}.jpg", 100_000 + number, number, size=shapes[number % 40])

    at_start = peak_mb()
    began = last = time.perf_counter()
    parts: dict[str, float] = {}

    def done(part: str) -> None:
        nonlocal last
        parts[part], last = time.perf_counter() - last, time.perf_counter()

    found = discover(dataset_of(folder, 1024, Listed), folder / "index", 0, Console(is_main=False))
    done("index")
    group = Group("pictures", found.samples)
    describe(group, 4)
    done("buckets")
    sampler = Sampler([group], 4, seed=0)
    assert len(sampler.at(0).samples) == 4 and sampler.at(sampler.batches_per_epoch()).epoch == 1
    done("sampler")
    sampler.digest()
    done("digest")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time(),
        "memory_mb": peak_mb(),
        "memory_at_start_mb": at_start,
        "parts": parts,
    }


def peak_mb() -> float:
    """Peak resident memory of this process. `ru_maxrss` would begin at that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


PARTS: dict[str, Callable[[Path, Sizes], dict[str, object]]] = {
    "index": measure_index,
    "caching": measure_caching,
    "loading": measure_loading,
    "scale": measure_scale,
}
TABLE = {
    "index": [
        "index of {images} JPEGs of {picture}, from nothing: {ratio:.0f} times faster than decoding ({least:.0f} .. {most:.0f}); wanted 100",
        "  {ours:.2e} s an image against {theirs:.2e} s; a second start takes {warm_seconds:.2f} s, wanted under 1",
    ],
    "caching": [
        "caching of {images} JPEGs of {picture} at {bucket}: {ratio:.3f} of the encoder alone ({least:.3f} .. {most:.3f}); wanted 0.9",
        "  {pipeline:.2f} images/s against {alone:.2f}",
    ],
    "loading": [
        "training on cached batches: {ratio:.4f} of the step on one batch in memory ({least:.4f} .. {most:.4f}); wanted under 1.02",
        "  {parameters:,} parameters, {fed:.3f} s a step, not {in_memory:.3f}; waiting {wait_share:.4%} of it, {worst_wait_seconds:.3f} s at worst",
        "  a batch read without reading ahead would cost {cost_share:.3%} of a step; wanted under 2%",
    ],
    "scale": [
        "start on {samples:,} samples: {seconds:.1f} s ({least:.1f} .. {most:.1f}), {cpu_seconds:.1f} s of them on a core; wanted 30",
        "  {memory_mb:.0f} MB at most, of which {memory_at_start_mb:.0f} were there before; wanted 1000",
    ],
}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
