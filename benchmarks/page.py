"""Make docs/benchmarks.md of the results: every table names its machine, and every figure in it was measured.

    python benchmarks/page.py [FILE ...] > docs/benchmarks.md

Takes all files of benchmarks/results that speed.py, growth.py, anatomy.py and vram.py wrote, if none is given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.book import RESULTS

GB = 1e9
HEAD = """\
# Benchmarks

What a training step takes here, in time and in memory. This page is made of `benchmarks/results` by `python benchmarks/page.py`; nothing in it
is estimated. To repeat it on your machine, without a network: `python benchmarks/speed.py` on a CPU, `benchmarks/gpu.sh` on a GPU.

Each row was measured in one process, in which all contenders took turns: so many steps of one, as many of the next, round by round, in an order
that is turned around each time. The first round does not count. Times are medians of the steps, with their quartiles. Ratios are medians over
the rounds of our time by the other's, with the least and the most: below 1 we are faster. Models have random weights and the shapes of the
released ones (real), or fewer and narrower layers (medium, of some 50 million parameters; tiny).

- **floor**: the shortest loop of plain PyTorch with the same form of adapter; its one batch lies on the device.
- **library**: the same loop with LyCORIS as it comes, which builds every adapted weight anew in each step.
- **peer**: the formulas of diffusers' training scripts with PEFT's LoRA, a smaller adapter on attention alone.
- **ours, bf16** and **ours, kept**: our own run without quantising, and without `gradient_checkpointing`.

Of use: operations that a step needs (nothing that is computed again), by our time, as a share of the rate at which large products of bf16
matrices ran in the same process.
"""
CONTENDERS = ("floor", "library", "peer", "ours, bf16", "ours, kept")


def page(books: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    parts = [HEAD]
    for book in books:
        kinds = ("speed", "memory", "growth", "caching", "anatomy")
        found = [{name: case for name, case in book["cases"].items() if case.get("kind") == kind} for kind in kinds]
        speeds, memory, growth, caching, anatomies = found
        described = _machine(book, [case for some in found for case in some.values()])
        parts += [
            f"## {book['machine'].get('device', 'Unknown machine')}",
            described,
            *_memory(memory),
            *_speed(speeds),
            *_anatomy(anatomies),
            *_growth(growth),
            *_caching(caching),
            *_tests(book),
            *_left_out(book),
        ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _machine(book: Mapping[str, Any], cases: Iterable[Mapping[str, Any]]) -> str:
    machine, cases = book["machine"], list(cases)
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in machine else ""
    days, commits = sorted({case["day"] for case in cases}), Counter(case["commit"] or "unknown" for case in cases)
    versions = Counter(", ".join(f"{name} {value}" for name, value in case["versions"].items()) for case in cases)
    said = [f"{machine.get('cores')} cores, {machine.get('threads')} threads{memory}; {machine.get('system')}."]
    if cases:
        said += [f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))}, commit {', '.join(commits)}."]
        said += [f"With {one}." for one in versions]
    return "\n".join(said)


def _speed(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    done = {name: case for name, case in cases.items() if "left_out" not in case}
    if not done:
        return []
    shown = [one for one in CONTENDERS if any(one in case["ours_by"] for case in done.values())]
    lines = ["### Time of a step", "", f"| case | ours, ms (quartiles) | {' | '.join(f'by {one}' for one in shown)} | of use |"]
    lines.append("|---|---|" + "---|" * (len(shown) + 1))
    for name, case in done.items():
        ours, mended = case["contenders"]["ours"], " *" if case["ran_out"] else ""
        low, high = (value * 1e3 for value in ours["quartiles"])
        ratios = [_ratio(case["ours_by"].get(one)) for one in shown]
        lines.append(
            f"| {name}{mended} | {ours['seconds'] * 1e3:.1f} ({low:.1f} - {high:.1f}) | {' | '.join(ratios)} | {case['useful']['of_square']:.0%} |"
        )
    if any(case["ran_out"] for case in done.values()):
        lines += ["", "\\* memory ran out in a step, which was then taken in parts."]
    return ["\n".join(lines), *_alone(done)]


def _ratio(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['median']:.3f} ({found['least']:.2f} - {found['most']:.2f})"


def _alone(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    measured = {name: case["alone"] for name, case in cases.items() if "alone" in case}
    if not measured:
        return []
    lines = [
        "Each in a process of its own: the most main memory, and from the start of the process to the end of its first step. Ours reads and caches"
    ]
    lines += [
        "pictures and captions before; the floor has its batch.",
        "",
        "| case | ours, MB | floor, MB | more, MB | ours, s | floor, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        ours, floor = found["ours"], found["floor"]
        bytes_ = [ours["peak_bytes"], floor["peak_bytes"], ours["peak_bytes"] - floor["peak_bytes"]]
        cells = [f"{value / 1e6:.0f}" for value in bytes_] + [f"{one['first_step_seconds']:.1f}" for one in (ours, floor)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


def _memory(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """On a GPU alone: a CPU has no memory of its own to measure."""
    done = {name: case for name, case in cases.items() if "left_out" not in case and case["measured"]["step"]["allocated"]}
    if not done:
        return []
    lines = [
        "### Memory",
        "",
        "LoKr, batch 1, gradient checkpointing. Torch was given no more of the card than the goal, but in the rows without one.",
    ]
    lines += ["Taken is what its allocator had of the card, to which CUDA adds its own; planned, what `simpletuner plan` says of the step.", ""]
    lines += [
        "| run | step, GB | planned, GB | off by | taken, GB | loading, GB | main memory, GB | page-locked, GB | step, ms | goal |",
        "|---|" + "---|" * 9,
    ]
    for name, case in done.items():
        measured, goal = case["measured"], {None: "", True: f"{case['goal']['card_bytes'] / GB:.0f} GB: met", False: "missed"}[case["is_met"]]
        sizes = [measured["step"]["allocated"], case["planned"]["step"]["vram_bytes"]]
        others = [
            max(measured[part]["reserved"] for part in ("load", "step")),
            measured["load"]["allocated"],
            measured["host_bytes"],
            measured["pinned_bytes"],
        ]
        cells = [*(f"{value / GB:.2f}" for value in sizes), f"{case['plan_is_off_by']:+.1%}", *(f"{value / GB:.2f}" for value in others)]
        lines.append(f"| {name.removeprefix('memory of ')} | {' | '.join(cells)} | {case['seconds'] * 1e3:.0f} | {goal} |")
    return ["\n".join(lines)]


def _anatomy(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not cases:
        return []
    lines = ["### Where the time of a step goes", "", "Seen by PyTorch's profiler, which takes time itself: shares are to be believed.", ""]
    lines += [f"| work | {' | '.join(name.removeprefix('anatomy of ') for name in cases)} |", "|---|" + "---|" * len(cases)]
    for kind in dict.fromkeys(kind for case in cases.values() for kind in case["ours"]):
        shares = [f"{case['ours'].get(kind, 0) / sum(case['ours'].values()):.1%}" for case in cases.values()]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    return ["\n".join(lines)]


def _growth(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not cases:
        return []
    lines = [
        "### How a step grows",
        "",
        "Times the first row of each: a step, and the bf16 products, convolutions and attention of its layers alone.",
        "",
    ]
    lines += ["| model | batch | picture | step, ms | step | products | off |", "|---|---|---|---|---|---|---|"]
    for name, case in cases.items():
        for row in (*case["by_batch"], *case["by_pixels"]):
            cells = [name.removeprefix("growth of "), str(row["batch"]), row["picture"], f"{row['step'] * 1e3:.1f}"]
            lines.append(f"| {' | '.join(cells)} | x {row['grown']:.2f} | x {row['curve']:.2f} | {row['off']:+.1%} |")
    return ["\n".join(lines)]


def _caching(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [row for case in cases.values() for row in case["by_images"]]
    if not rows:
        return []
    lines = ["### How caching grows", "", "Small images and next to no encoder: what is left is finding, reading, decoding and writing.", ""]
    lines += ["| images | found, a second | cached, a second | looked through again, s |", "|---|---|---|---|"]
    lines += [f"| {row['images']:,} | {row['index_per_second']:.0f} | {row['fill_per_second']:.0f} | {row['again_seconds']:.2f} |" for row in rows]
    return ["\n".join(lines)]


def _tests(book: Mapping[str, Any]) -> list[str]:
    found = book["cases"].get("tests")
    if not found or "left_out" in found:
        return []
    failed = "".join(f"\n- {name}" for name in found["failed"])
    return [f"### Tests\n\n{found['passed']} tests that want a GPU passed, {len(found['failed'])} failed, {found['skipped']} were skipped.{failed}"]


def _left_out(book: Mapping[str, Any]) -> list[str]:
    found = {name: case["left_out"] for name, case in book["cases"].items() if "left_out" in case}
    return ["### Not measured\n\n" + "\n".join(f"- {name}: {why}" for name, why in found.items())] if found else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args().files or sorted(RESULTS.glob("*.json"))
    books = [content for content in (json.loads(file.read_text()) for file in files) if "cases" in content]
    print(page(books), end="")


if __name__ == "__main__":
    main()
