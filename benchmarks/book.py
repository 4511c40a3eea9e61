"""The results of a machine: one JSON file, written after every case, in which a case that is there already is not measured again.

A figure holds for the sources and the versions that it was measured with: under others a case is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "lycoris-lora", "optimum-quanto", "torchao", "bitsandbytes", "triton")
ATTEMPTS = 2
"""Times that a case is begun: one that ends its process each time would otherwise keep all that come after it from being measured."""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def sources() -> str:
    """A digest of our own code, which needs no git and tells changes that are not committed yet."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*(ROOT / "simpletuner").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def commit() -> str:
    """The commit, if git tells one; with a plus if there are changes on it."""
    try:
        found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("COMMIT", "")
    return found.stdout.strip() if found.returncode == 0 else os.environ.get("COMMIT", "")


@dataclass(frozen=True)
class Book:
    """The file of one machine."""

    path: Path

    @classmethod
    def of(cls, folder: Path, device: str) -> Book:
        """The book of a machine, by the name of its device."""
        return cls(folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json")

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return {"machine": {}, "begun": {}, "cases": {}, **content}

    def is_done(self, name: str) -> bool:
        """Whether the case was measured, or could not be, with what there is now."""
        found = self.read()["cases"].get(name)
        return found is not None and found["key"] == key()

    def begin(self, name: str) -> bool:
        """Note that a case is begun; False, with that as its result, if it was begun before and ended its process each time."""
        content = self.read()
        before = content["begun"].get(name, {})
        count = before["count"] if before.get("key") == key() else 0
        if count >= ATTEMPTS:
            self.write(name, {"left_out": f"the process ended {count} times before there was a result"})
            return False
        content["begun"][name] = {"key": key(), "count": count + 1}
        self._save(content)
        return True

    def write(self, name: str, result: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> None:
        """Write what came of a case."""
        content = self.read()
        content["begun"].pop(name, None)
        content["machine"] = dict(machine) if machine else content["machine"]
        day = time.strftime("%Y-%m-%d", time.gmtime())
        content["cases"][name] = {"key": key(), "commit": commit(), "versions": versions(), "day": day, **result}
        self._save(content)

    def _save(self, content: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(self.path)  # whoever ends the process leaves a whole file behind


def key() -> str:
    """What a result depends on: our sources and the libraries' versions."""
    return hashlib.blake2b(json.dumps([sources(), versions()]).encode(), digest_size=8).hexdigest()
