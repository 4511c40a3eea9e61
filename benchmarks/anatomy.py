"""Where the time of a step of ours goes, by kind of work.

    python benchmarks/anatomy.py [--size tiny|medium|real] [--only auraflow] [--adapter lokr|lora] [--steps 3]

Each operation is watched by PyTorch's profiler, and its own time, that of the device where there is one, is given to the first kind that claims it
or one that it runs within. Watching costs time itself: shares are to be believed, not the sum. With a plain LoRA the products of the layers that
it is on are in `adapters` too, since both are one operation. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.book import RESULTS, Book
from benchmarks.cases import BATCH, MODELS, PIXELS, SIZES, Case
from benchmarks.harness import device_name, device_named, machine
from benchmarks.product import Ours
from benchmarks.speed import contenders

KINDS: dict[str, tuple[str, ...]] = {
    "adapters": ("_AddedProduct",),
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad"),
    "norms of gradients": ("aten::_foreach_norm", "aten::linalg_vector_norm"),
    "attention": ("scaled_dot_product", "ScaledDotProduct", "flash_attention", "efficient_attention"),
    "products of layers": ("aten::mm", "aten::addmm", "aten::linear", "aten::bmm", "aten::baddbmm", "mkldnn_linear", "_int_mm", "_scaled_mm"),
    "convolutions": ("convolution", "conv2d"),
    "norms": ("layer_norm", "group_norm", "rms_norm", "NativeLayerNorm", "NativeGroupNorm"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::contiguous", "aten::clone", "aten::cat"),
}
"""Names of operations, or beginnings of parts of them, by kind; the first that holds decides."""
OTHER = "elementwise and all else"


def kind_of(event: Any) -> str:
    """The kind of an operation, by its own name and those it runs within."""
    names, one = [], event
    while one is not None:
        names.append(one.name)
        one = one.cpu_parent
    for kind, words in KINDS.items():
        if any(word in name for name in names for word in words):
            return kind
    return OTHER


def anatomy(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, float]:
    """Seconds of a step by kind."""
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as seen:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    sums: Counter[str] = Counter()
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CPU:
            taken = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            sums[kind_of(event)] += taken / 1e6 / steps
    return dict(sums.most_common())


def of_model(model: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    case = Case(model, arguments.size, arguments.adapter, px=PIXELS[arguments.size][0], batch=BATCH[arguments.size])
    held: list[Ours] = []
    with tempfile.TemporaryDirectory() as name:
        try:
            made = contenders(case, Path(name).resolve(), device, held)
            return {"kind": "anatomy", "ours": anatomy(made["ours"][0], arguments.steps, device)}
        finally:
            for ours in held:
                ours.close()


def table(found: dict[str, Any]) -> str:
    """Milliseconds and shares by kind."""
    whole = sum(found["ours"].values())
    lines = [f"{kind:28} {seconds * 1e3:9.1f} ms {seconds / whole:6.1%}" for kind, seconds in found["ours"].items()]
    return "\n".join([*lines, f"{'together':28} {whole * 1e3:9.1f} ms"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--adapter", choices=("lokr", "lora"), default="lokr")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = device_named(arguments.device)
    book = Book.of(arguments.results, device_name(device))
    for model in arguments.only:
        title = f"anatomy of {model} {arguments.size}, {arguments.adapter}"
        if not book.is_done(title):
            book.write(title, of_model(model, arguments, device), machine(device))
        print(f"{title}\n{table(book.read()['cases'][title])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
