"""Run the tests that want a GPU, and note in the machine's results which of them passed.

python benchmarks/gpu_tests.py [--results DIR] [--until SECONDS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Tree
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.book import RESULTS, ROOT, Book
from benchmarks.harness import device_name, device_named, machine

CASE = "tests"
MARKS = "mark.gpu", "NEEDS_GPU"
LEAST_SECONDS, MOST_SECONDS = 60.0, 240.0
"""Left for them to be begun, and what they get: other parts are to come."""


def files() -> list[str]:
    """Those that hold such a test; on a bare machine others may lack what they import."""
    texts = {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    return sorted(path for path, text in texts.items() if any(mark in text for mark in MARKS))


def run(seconds: float) -> dict[str, Any]:
    """Run them, for so long at the most."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", *files()]
        try:
            answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"left_out": f"not done within {seconds:.0f} s"}
        print(answer.stdout[-6000:], file=sys.stderr)
        return read(report) if report.is_file() else {"left_out": (answer.stderr or answer.stdout).strip()[-300:]}


def read(report: Path) -> dict[str, Any]:
    """Which tests passed, by pytest's report."""
    cases = list(Tree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname', '')}: {case.get('name')}".removeprefix(": ") for case in failed]
    return {"passed": len(cases) - len(failed) - skipped, "failed": names, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--until", type=float, help="be done by then, in seconds since 1970")
    arguments = parser.parse_args()
    device = device_named(arguments.device)
    book, left = Book.of(arguments.results, device_name(device)), arguments.until - time.time() if arguments.until else 3600.0
    if book.is_done(CASE) or left < LEAST_SECONDS or not book.begin(CASE):
        return 0
    book.write(CASE, {"kind": "tests", **run(min(left, MOST_SECONDS))}, machine(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
