"""The page: what is known of a run, its figures and its pictures, in one HTML file of bounded size that asks nothing of anybody."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from simpletuner.reporting.report.advice import advise
from simpletuner.reporting.report.state import PAGE_FILE, State, write_whole

GALLERY = "validation_images"
EVALUATIONS, BEST = "evaluation.jsonl", "best_checkpoint.json"
PICTURE_PX, QUALITY = 448, 80
"""Longest side and WebP quality of pictures in the page."""
MOST_BYTES = 6_000_000
"""Of all pictures in a page, before base64 makes a third more of them."""
LETTERS = 2000
"""Of a prompt, a warning, a value."""
NAME = re.compile(r"(?P<label>base|step_(?P<step>\d+)(?P<average>_ema)?)_(?P<stem>.+)\.(?:png|webp|jpg)$", re.DOTALL)
"""What validation calls its pictures."""
SOURCES = {False: "img-src data:", True: "img-src data: 'self'; connect-src 'self'"}
"""What the page may load, by whether it is served live."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture of a validation."""

    path: Path
    label: str
    """base, step_00100, step_00100_ema."""
    step: int
    stem: str
    """What the picture is of: a prompt's name, its seed and size."""


class Pictures:
    """The pictures of a run, made small once each."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._small: dict[tuple[str, int, int], bytes] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self.seconds = 0.0
        """Of this thread's time that making them small took."""

    def there(self) -> list[Shown]:
        """All of them, by steps; grids are none."""
        found = []
        for path in (self._output_dir / GALLERY).iterdir() if (self._output_dir / GALLERY).is_dir() else ():
            match = NAME.match(path.name)
            if match and match["stem"] != "grid" and path.is_file():
                found.append(Shown(path, match["label"], int(match["step"] or -1), match["stem"]))
        return sorted(found, key=lambda one: (one.step, one.label, one.stem))

    def embedded(self, keep: Callable[[str], bool] = lambda label: False) -> tuple[list[Shown], dict[Path, str], list[str]]:
        """As many as there is room for, as data URIs.

        Args:
            keep: labels that are to be there whichever are left out, e.g. the best step's.

        Returns:
            The pictures, their URIs, and the labels that are left out.
        """
        every = self.there()
        labels = list(dict.fromkeys(one.label for one in every))
        stride = 1
        while True:
            kept = {label for at, label in enumerate(labels) if at % stride == 0 or at in (1, len(labels) - 1) or keep(label)}
            shown = [one for one in every if one.label in kept]
            data = self._all_small(shown)
            if data is not None or len(kept) <= 3 or stride > len(labels):
                break
            stride *= 2
        if data is None:  # too many prompts for even a few steps
            data, shown = self._as_many_as_fit(shown)
        return shown, {path: as_uri(one) for path, one in data.items()}, [label for label in labels if label not in kept]

    def _all_small(self, shown: Sequence[Shown]) -> dict[Path, bytes] | None:
        """Pictures made small; None as soon as they are too many."""
        found, room = {}, MOST_BYTES
        for one in shown:
            found[one.path] = self.small(one.path)
            room -= len(found[one.path])
            if room < 0:
                return None
        return found

    def _as_many_as_fit(self, shown: Sequence[Shown]) -> tuple[dict[Path, bytes], list[Shown]]:
        """The pictures of as many prompts as there is room for."""
        found: dict[Path, bytes] = {}
        kept: list[Shown] = []
        room = MOST_BYTES
        for stem in dict.fromkeys(one.stem for one in shown):
            mine = [one for one in shown if one.stem == stem]
            made = {one.path: self.small(one.path) for one in mine}
            room -= sum(map(len, made.values()))
            if room < 0:
                break
            found |= made
            kept += mine
        return found, kept

    def small(self, path: Path) -> bytes:
        """A picture as WebP, made small; empty if it cannot be read."""
        try:
            stat = path.stat()
            key = (path.name, stat.st_mtime_ns, stat.st_size)
            if key not in self._small:
                began = time.thread_time()
                self._small = {known: data for known, data in self._small.items() if known[0] != path.name}
                self._small[key] = small(path)
                self.seconds += time.thread_time() - began
            return self._small[key]
        except (OSError, ValueError, SyntaxError):
            return b""

    def text_of(self, path: Path) -> dict[str, str]:
        """What a picture's file says of it; nothing if it says nothing."""
        if path.name not in self._texts:
            try:
                self._texts[path.name] = texts_of(path)
            except (OSError, ValueError, SyntaxError):
                return {}
        return self._texts[path.name]


def small(path: Path, longest_px: int = PICTURE_PX) -> bytes:
    """A picture as WebP, made smaller if it is large; one of a few pixels stays exact.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (longest_px, longest_px))
        plain = image.convert("RGB")
    plain.thumbnail((longest_px, longest_px))
    buffer = io.BytesIO()
    plain.save(buffer, "WEBP", quality=QUALITY, lossless=max(plain.size) <= 96, method=2)
    return buffer.getvalue()


def texts_of(path: Path) -> dict[str, str]:
    """The texts in a picture's file: those of a PNG, or the JSON in the description of another format.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    from PIL import ExifTags, Image

    with Image.open(path) as image:
        if path.suffix == ".png":
            found: Mapping[str, Any] = getattr(image, "text", {})
        else:
            found = json.loads(image.getexif().get(ExifTags.Base.ImageDescription) or "{}")
    return {str(key): str(value)[:LETTERS] for key, value in found.items()}


def as_uri(data: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}" if data else ""


def write_page(output_dir: Path, state: State, pictures: Pictures) -> None:
    """Renew the page of a run.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(output_dir / PAGE_FILE, as_html("report", content_of(output_dir, state, pictures)))


def as_html(kind: str, content: Mapping[str, Any], *, is_live: bool = False) -> str:
    """A whole page.

    Args:
        kind: `report` or `compare`: what shows the content.
        is_live: whether it asks the server that it comes from for more.
    """
    text = json.dumps({**content, "live": is_live}, ensure_ascii=False, separators=(",", ":"), default=str)
    parts = {
        "sources": SOURCES[is_live],
        "style": asset("style.css"),
        "script": asset("common.js") + asset(f"{kind}.js"),
        # Inside a script no text but "<" can end it; JSON writes that letter so, too.
        "content": text.replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))  # in one go: texts may hold such words themselves


def asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def content_of(output_dir: Path, state: State, pictures: Pictures, *, link: Callable[[Path], str] | None = None) -> dict[str, Any]:
    """What the page's script reads.

    Args:
        link: gives the address of a picture, where the page is served; without it they are put into the page.
    """
    evaluations, best = rows_of(output_dir / EVALUATIONS), best_of(output_dir, state)
    return {
        "status": state.status,
        "ended": state.ended[:LETTERS],
        "began": state.began,
        "updated": state.updated,
        "step": state.step,
        "total_steps": state.total_steps,
        "epoch": state.epoch,
        "starts": state.starts,
        "phase": state.phase,
        "phases": state.phases,
        "spans": state.spans,
        "facts": {key: value for key, value in state.facts.items() if key not in ("settings", "origins")},
        "curves": {name: curve.as_json()["bins"] for name, curve in state.curves.items()},
        "memory": {name: curve.as_json()["bins"] for name, curve in state.memory.items()},
        "evaluations": evaluations,
        "best": best,
        "checkpoints": [step for step in sorted(state.checkpoints) if (output_dir / state.checkpoints[step]).is_dir()],
        "samples": samples_of(pictures, best, link),
        "crops": state.crops,
        "settings": settings_of(state),
        "changes": changes_of(state),
        "warnings": state.warnings,
        "advice": advise(state, evaluations, best),
    }


def rows_of(file: Path) -> list[dict[str, float]]:
    """Figures of evaluations by step; a line that was cut short is left out."""
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    except OSError:
        return []
    steps = [row for row in rows if "step" in row]
    return thinned([{str(key): value for key, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)} for row in steps])


def thinned(rows: list[dict[str, float]], most: int = 600) -> list[dict[str, float]]:
    """Every so many-th row, and the last."""
    stride = -(-len(rows) // most) or 1
    return rows if stride == 1 else [row for at, row in enumerate(rows) if at % stride == 0 or at == len(rows) - 1]


def best_of(output_dir: Path, state: State) -> dict[str, Any] | None:
    """The best evaluation of a step that was trained: its step, its value, and the checkpoint of that step if there is one."""
    metric = state.facts.get("metric", "loss")
    values = values_of(rows_of(output_dir / EVALUATIONS), metric)
    trained = {step: value for step, value in values.items() if step}
    if not trained:
        return None
    better = max if metric == "clip" else min
    best = better(trained, key=lambda step: (trained[step], -step if metric == "clip" else step))
    has_folder = (output_dir / f"checkpoint-{best}").is_dir()
    kept = [step for step in trained if (output_dir / f"checkpoint-{step}").is_dir()]
    saved = better(kept, key=lambda step: trained[step]) if kept else None
    return {"step": best, "value": trained[best], "metric": metric, "is_saved": has_folder, "saved": saved, "last": max(trained)}


def values_of(rows: Sequence[Mapping[str, float]], metric: str) -> dict[int, float]:
    """The mean held-out loss, or the CLIP score, by step."""
    found = {}
    for row in rows:
        losses = [value for name, value in row.items() if name.startswith("loss/val/") and "/" not in name.removeprefix("loss/val/")]
        if metric == "clip" and "clip/mean" in row:
            found[int(row["step"])] = row["clip/mean"]
        elif metric != "clip" and losses:
            found[int(row["step"])] = sum(losses) / len(losses)
    return found


def samples_of(pictures: Pictures, best: Mapping[str, Any] | None, link: Callable[[Path], str] | None) -> dict[str, Any]:
    """The pictures of validations: a column a look, a row a prompt, seed and size."""
    if link is not None:
        shown, left_out = pictures.there(), list[str]()
        addresses = {one.path: link(one.path) for one in shown}
    else:
        at_best = f"step_{best['step']:05d}" if best else ""
        shown, addresses, left_out = pictures.embedded(lambda label: label == at_best)
    labels = {one.label: one.step for one in shown}
    rows = []
    for stem in dict.fromkeys(one.stem for one in shown):
        mine = [one for one in shown if one.stem == stem]
        said = pictures.text_of(mine[-1].path)
        rows.append({"stem": stem, "said": said, "pictures": {one.label: addresses[one.path] for one in mine if addresses.get(one.path)}})
    missing = len({one.stem for one in pictures.there()}) - len(rows)
    return {"labels": labels, "rows": rows, "left_out": left_out, "rows_left_out": missing, "folder": GALLERY}


def settings_of(state: State) -> list[dict[str, str]]:
    """Effective options: those that were set, then those of the family, then the defaults."""
    origins = state.facts.get("origins") or {}
    order = {"default": 2, "family": 1}
    rows = [
        {"key": key, "value": as_text(value), "origin": origins.get(key, "")}
        for key, value in (state.facts.get("settings") or {}).items()
        if value is not None or origins.get(key, "default") != "default"
    ]
    return sorted(rows, key=lambda row: (order.get(row["origin"].partition(" ")[0], 0) if row["origin"] else 2, row["key"]))


def changes_of(state: State) -> list[dict[str, str]] | None:
    """Options that are others than in the start before; None if there was none."""
    now, before = state.facts.get("settings") or {}, state.previous
    if not before:
        return None
    keys = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
    return [{"key": key, "before": as_text(before.get(key)), "now": as_text(now.get(key))} for key in keys]


def as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
