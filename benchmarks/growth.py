"""How cost grows: a step with the batch and with the pixels beside its own matrix products, and caching with the number of images.

    python benchmarks/growth.py [--size tiny|medium|real] [--only auraflow] [--rounds 5] [--images 1000 10000 100000]

A step of twice the batch should take twice the time as far as the products of its layers do, which run faster in larger shapes, and its attention,
which grows with the square of the tokens. Both are timed here, in turns with the steps, in one process. Results go to benchmarks/results, as
those of speed.py do; they want a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.book import RESULTS, Book
from benchmarks.cases import BATCH, MODELS, PIXELS, SIZES
from benchmarks.harness import Contender, device_name, device_named, machine, take_turns
from benchmarks.product import FACTOR, Bases, Job, Ours, put_together, write_data
from benchmarks.useful import Work, needed
from simpletuner.types import Size

BATCHES = (1, 2, 4, 8)
SIDES = ((1, 1), (1, 2), (2, 2), (2, 4))
"""Of pictures, in those of the size that is usual: one, two, four and eight times the pixels."""
STEPS = 2
"""Of each in a round."""
IMAGE_PX = 64
"""Side of the images that are cached: so small that counting, reading and writing are what is measured, and not an encoder."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--only", nargs="+", default=[*MODELS, "caching"], choices=[*MODELS, "caching"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = device_named(arguments.device)
    book = Book.of(arguments.results, device_name(device))
    for name in arguments.only:
        title = "caching, by images" if name == "caching" else f"growth of {name} {arguments.size}"
        if not book.is_done(title):
            found = of_caching(arguments.images) if name == "caching" else of_steps(name, arguments.size, device, arguments.rounds)
            book.write(title, found, machine(device))
            print(f"{title}: {in_a_line(found)}", file=sys.stderr, flush=True)
    return 0


def of_steps(model: str, size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time steps of all sizes, and their products, in turns."""
    edge, unit = PIXELS[size][0], BATCH[size]
    by_batch = [(batch, Size(edge, edge)) for batch in BATCHES]
    by_pixels = [(unit, Size(edge * width, edge * height)) for width, height in SIDES]
    held: list[Ours] = []
    contenders, bases = {}, None
    with tempfile.TemporaryDirectory() as name:
        try:
            for batch, picture in dict.fromkeys([*by_batch, *by_pixels]):
                folder, job = Path(name).resolve() / f"{batch} {picture}", Job(model, size, (picture,), batch)
                folder.mkdir()
                write_data(folder, job)
                bases = bases or Bases(job)
                ours = put_together(folder, job, "lokr", {"gradient_checkpointing": False}, bases)
                held.append(ours)
                (feed,) = ours.buckets
                work = needed(model, size, "lokr", FACTOR[size], feed.latents["mean"].shape, feed.text["prompt"].shape[1])
                contenders[f"step {batch} {picture}"] = ours.step
                contenders[f"products {batch} {picture}"] = products_of(work, device)
            turns = take_turns([Contender(name, step) for name, step in contenders.items()], rounds, STEPS, device)
        finally:
            for ours in held:
                ours.close()
    medians = {name: statistics.median(second for steps in turn.rounds for second in steps) for name, turn in turns.items()}
    return {"kind": "growth", "by_batch": _rows(medians, by_batch), "by_pixels": _rows(medians, by_pixels)}


def _rows(medians: dict[str, float], sizes: Sequence[tuple[int, Size]]) -> list[dict[str, Any]]:
    """Seconds at each size; how many times those of the first one, and how many times the products took theirs."""
    first = f"{sizes[0][0]} {sizes[0][1]}"
    found = []
    for batch, picture in sizes:
        name = f"{batch} {picture}"
        step, products = medians[f"step {name}"], medians[f"products {name}"]
        grown, curve = step / medians[f"step {first}"], products / medians[f"products {first}"]
        found.append(
            {"batch": batch, "picture": str(picture), "step": step, "products": products, "grown": grown, "curve": curve, "off": grown / curve - 1}
        )
    return found


def products_of(work: Work, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Callable[[], None]:
    """The products and convolutions of a step's frozen layers and its attention, both passes, on random numbers."""
    layers = []
    for (rows, inputs, outputs), operations in work.products.items():
        times = operations / (2 * rows * inputs * outputs)  # 2 for each layer that also gives its inputs a gradient
        x, weight, grad = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        layers.append((x, weight, grad, round(times - times // 2), round(times // 2)))
    convolved = []
    for (shape, kernel, stride, padding, goes_back), count in work.convolutions.items():
        x, weight = torch.randn(shape, device=device, dtype=dtype), torch.randn(kernel, device=device, dtype=dtype)
        convolved.append((x.requires_grad_(goes_back), weight, stride, padding, count))
    heads = []
    for (query, keys), count in work.attentions.items():
        shapes = (query, (*query[:2], keys, query[3]), (*query[:2], keys, query[3]))
        heads.append(([torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes], count))

    def step() -> None:
        for x, weight, grad, there, back in layers:
            for _ in range(there):
                torch.mm(x, weight.t())
            for _ in range(back):
                torch.mm(grad, weight)
        for x, weight, stride, padding, count in convolved:
            for _ in range(count):
                answer = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
                if x.requires_grad:
                    torch.autograd.grad(answer, x, answer.detach())
        for tensors, count in heads:
            for _ in range(count):
                answer = torch.nn.functional.scaled_dot_product_attention(*tensors)
                torch.autograd.grad(answer, tensors, answer.detach())

    return step


def of_caching(counts: Sequence[int]) -> dict[str, Any]:
    """Find and cache so many small images with a small encoder, each number in a folder of its own; images a second."""
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            found.append({"images": count, **_cached(Path(name), count)})
    return {"kind": "caching", "by_images": found}


def _cached(folder: Path, count: int) -> dict[str, float]:
    from benchmarks.data import dataset_of
    from simpletuner.console import Console
    from simpletuner.data.contents import ContentBook, ImageReader
    from simpletuner.data.discover import discover
    from simpletuner.data.latents import LatentCache
    from simpletuner.data.store import Store

    write_images(folder / "pictures", count)
    dataset, index = dataset_of(folder, IMAGE_PX), folder / "index"
    began = time.perf_counter()
    samples = discover(dataset, index, 0, Console(is_main=False)).samples
    indexed = time.perf_counter()

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        means = torch.nn.functional.avg_pool2d(pixels[:, [0, 1, 2, 0]], 8)
        return {"mean": means, "std": means.abs() * 0.1}

    cache = LatentCache(Store(folder / "latents"), encode, "vae", ImageReader({"pictures": dataset.open()}, ContentBook(index)), 4, warn=print)
    with _one_thread():
        cache.fill(samples)
    filled = time.perf_counter()
    missing = len(cache.missing(samples))
    assert not missing, missing
    again = time.perf_counter() - filled
    return {"index_per_second": count / (indexed - began), "fill_per_second": count / (filled - indexed), "again_seconds": again}


@contextmanager
def _one_thread() -> Iterator[None]:
    """The encoder is not what is measured: on more threads it waits for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_images(folder: Path, count: int) -> None:
    """Different images, as many as are asked for: each is a PNG that begins alike and differs in one row of pixels."""
    import numpy
    from PIL import Image

    folder.mkdir()
    pixels = numpy.random.default_rng(0).integers(0, 255, (IMAGE_PX, IMAGE_PX, 3), dtype=numpy.uint8)
    for number in range(count):
        pixels[0, :4] = numpy.frombuffer(number.to_bytes(12, "little"), dtype=numpy.uint8).reshape(4, 3)
        Image.fromarray(pixels).save(folder / f"picture_{number:06}.png", compress_level=0)
    os.sync()  # or the disk would be busy with these while the cache is filled


def in_a_line(found: dict[str, Any]) -> str:
    if found["kind"] == "caching":
        return ", ".join(f"{row['images']:,}: {row['fill_per_second']:.0f} images/s" for row in found["by_images"])
    parts = []
    for what in ("by_batch", "by_pixels"):
        rows = found[what][1:]
        parts.append(f"{what.replace('_', ' ')} " + ", ".join(f"x{row['grown']:.2f} (products x{row['curve']:.2f})" for row in rows))
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
