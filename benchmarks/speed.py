"""Time of a step: ours beside a bare loop, LyCORIS as it comes, and the training scripts of diffusers, in turns in one process.

    python benchmarks/speed.py [--size tiny|medium|real] [--only flux lokr] [--rounds 6] [--steps 3] [--alone]

Random weights, made on the device; nothing is downloaded. Each case goes into benchmarks/results/<device>.json as it is finished, and one that is
there for the same sources and versions is not measured again. `python benchmarks/page.py` makes a page of these files. Times want a
machine that does nothing else: look at the spread before you believe a median.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bare
from benchmarks.book import RESULTS, Book
from benchmarks.cases import SIZES, Case, every, wanted
from benchmarks.harness import Contender, device_name, device_named, figures, host_peak_bytes, machine, ratio, take_turns
from benchmarks.product import FACTOR, RANK, Bases, Job, Ours, put_together, write_data
from benchmarks.useful import needed, rates
from simpletuner.errors import SimpleTunerError

LEAST_SECONDS = 45.0
"""That a case is taken to need, on a GPU, until one has taken longer."""
TIME_IS_UP = 3
"""The exit code where cases are left for another call."""
TOKENS = {"auraflow": 256, "sdxl": 77, "flux": 512}
"""Of a prompt."""


def number_of(case: Case) -> int:
    """Factor or rank."""
    return FACTOR[case.size] if case.adapter == "lokr" else RANK[case.size]


def contenders(case: Case, folder: Path, device: torch.device, held: list[Ours]) -> dict[str, tuple[Callable[[], object], int]]:
    """What takes steps, and how many numbers each trains.

    Args:
        held: gets our runs, to be closed.
    """
    job = Job(case.model, case.size, case.pictures, case.batch)
    write_data(folder, job)
    bases, made, feeds = Bases(job), {}, []
    for name, (kind, precision, checkpointing) in sorted(case.contenders.items(), key=lambda item: item[1][0] != "ours"):
        if kind == "ours":
            options: dict[str, Any] = {"base_model_precision": precision, "gradient_checkpointing": checkpointing, **case.compiling(name)}
            options["output_dir"] = str(folder / f"output {name}")
            ours = put_together(folder, job, case.adapter, options, bases)
            held.append(ours)
            made[name] = ours.step, ours.trainable
            feeds = feeds or [_feed(ours, batch, device) for batch in ours.buckets]
            continue
        network = bases.plain(precision)
        if kind == "floor":
            made[name] = bare.floor(case.model, network, case.adapter, number_of(case), feeds, checkpointing)
        elif kind == "library":
            made[name] = bare.library(case.model, network, number_of(case), feeds, checkpointing)
        else:
            made[name] = bare.peer(case.model, network, RANK[case.size], feeds, checkpointing)
    return made


def _feed(ours: Ours, batch: Any, device: torch.device) -> bare.Feed:
    dtype = next(ours.run.denoiser.parameters()).dtype
    return bare.feed_of(ours.run.family.scale_latents(batch.latents["mean"].float()), batch.text, device, dtype)


def measure(case: Case, device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    """Have all contenders take turns, and tell what came out."""
    held: list[Ours] = []
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = contenders(case, Path(folder).resolve(), device, held)
            batches = held[0].buckets
            steps = -(-steps // len(batches)) * len(batches)  # each round draws every bucket equally often
            turns = take_turns([Contender(name, step) for name, (step, _) in made.items()], rounds, steps, device)
            events = sum(ours.run.trainer.recovery.events for ours in held)
            parameters = sum(parameter.numel() for parameter in held[0].run.denoiser.parameters() if not parameter.requires_grad)
        finally:
            for ours in held:
                ours.close()
    found: dict[str, Any] = {
        "parameters": parameters,
        "buckets": [str(batch.samples[0].geometry.bucket) for batch in batches],
        "rounds": rounds,
        "steps": steps,
        "contenders": {name: {**figures(turns[name]), "trainable": made[name][1]} for name in turns},
        "ours_by": {name: ratio(turns[name], turns["ours"]) for name in turns if name != "ours"},
        "ran_out": events,
        "memory_before_bytes": before,
    }
    return {**found, "useful": _useful(case, batches, found["contenders"]["ours"]["seconds"], device)}


def _useful(case: Case, batches: Sequence[Any], seconds: float, device: torch.device) -> dict[str, Any]:
    """What of the device's rate for products our step comes to."""
    shapes = [(batch.latents["mean"].shape, batch.text["prompt"].shape[1]) for batch in batches]
    works = [needed(case.model, case.size, case.adapter, number_of(case), shape, tokens) for shape, tokens in shapes]
    operations, found = sum(work.total for work in works) / len(works), rates(works[0], device)
    return {"operations": operations, "rate": operations / seconds, "of_square": operations / seconds / found["square"], **found}


def alone(case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """Train ours in this process, without anyone else: when the first step was done, and the most main memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        job = Job(case.model, case.size, case.pictures, case.batch)
        write_data(folder, job)
        ours = put_together(folder, job, case.adapter, {"gradient_checkpointing": False}, Bases(job))
        ours.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        first = time.time()
        for _ in range(steps):
            ours.step()
        ours.close()
        return {"peak_bytes": host_peak_bytes(), "first_step_at": first}


def both_alone(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours, from the first import and picture on, and the floor, whose batch is there: each in a process of its own."""
    size, steps = case.pictures[0], "4"
    shape = (number_of(case), case.batch, 16 if case.model == "flux" else 4, size.height // 8, size.width // 8, TOKENS[case.model])
    bare_file = str(Path(__file__).with_name("bare.py"))
    lines = {
        "ours": [__file__, "--device", arguments.device, "--size", case.size, "--steps", steps, "--alone-case", case.name],
        "floor": [bare_file, case.model, case.size, case.adapter, arguments.device, *map(str, shape), steps],
    }
    found = {}
    for who, line in lines.items():
        began = time.time()
        answer = json.loads(subprocess.run([sys.executable, *line], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        found[who] = {"peak_bytes": answer["peak_bytes"], "first_step_seconds": answer["first_step_at"] - began}
    return found


def run(cases: Sequence[Case], arguments: argparse.Namespace) -> int:
    """Measure what is not measured yet, as far as there is time."""
    device = device_named(arguments.device)
    book, longest = Book.of(arguments.results, device_name(device)), LEAST_SECONDS if device.type == "cuda" else 0.0
    for case in cases:
        if book.is_done(case.name):
            continue
        if arguments.until and time.time() + longest > arguments.until:
            print("time is up; the same command goes on from here", file=sys.stderr)
            return TIME_IS_UP
        if not book.begin(case.name):
            continue
        began = time.monotonic()
        result = attempt(case, device, arguments)
        longest = max(longest, time.monotonic() - began)
        book.write(case.name, {"kind": "speed", "took_seconds": round(time.monotonic() - began, 1), **result}, machine(device))
        print(f"{case.name}: {in_a_line(result)}", file=sys.stderr, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def attempt(case: Case, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """A case's figures, or why there are none."""
    try:
        found = measure(case, device, arguments.rounds, arguments.steps)
        return {**found, "alone": both_alone(case, arguments)} if arguments.alone and case.is_plain else found
    except SimpleTunerError as error:
        return {"left_out": error.message}
    except Exception as error:  # a library's any complaint: the other cases are to be measured all the same
        return {"left_out": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]}


def in_a_line(result: dict[str, Any]) -> str:
    if "left_out" in result:
        return f"left out: {result['left_out']}"
    ratios = ", ".join(f"{found['median']:.2f} x {name}" for name, found in result["ours_by"].items())
    return f"{result['contenders']['ours']['seconds'] * 1e3:.1f} ms a step; {ratios}; {result['useful']['of_square']:.0%} of the products' rate"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with all of these words in their names")
    parser.add_argument("--first", type=int, help="so many cases at most")
    parser.add_argument("--all", action="store_true", help="every combination, not those alone that the goals are about")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps of each per round")
    parser.add_argument("--alone", action="store_true", help="also measure main memory and the way to the first step, in processes of their own")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--until", type=float, help="begin no case that would not be done by then, in seconds since 1970")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--alone-case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = list(every(arguments.size) if arguments.all else wanted(arguments.size))
    if arguments.alone_case:
        case = next(case for case in [*wanted(arguments.size), *every(arguments.size)] if case.name == arguments.alone_case)
        print(json.dumps(alone(case, device_named(arguments.device), arguments.steps)))
        return 0
    cases = [case for case in cases if all(word in case.name for word in arguments.only)][: arguments.first]
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    return run(cases, arguments)


if __name__ == "__main__":
    sys.exit(main())
