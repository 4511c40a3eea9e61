"""An output folder of a run that never was, with all that its report shows, and texts that would like to break it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.reporting.report.curve import Curve
from simpletuner.reporting.report.state import State
from simpletuner.training.validation import write_picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="needs chromium and playwright, which are not installed"
)
NASTY = (
    "海辺 <b>bold</b> & \"quotes\" 'single' </script><script>document.title = 'taken over'</script> <!-- {{content}} {{style}} \u2028 " + "x" * 300
)
STEMS = {"sea_7_48x32": NASTY, "dog_7_32x32": "a dog", "<img src=x onerror=alert(1)>_7_32x32": "", "grid_7_32x32": "a grid"}
STEPS = (20, 40, 60)


def content_in(page: str) -> dict[str, Any]:
    """What the script of a page reads."""
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


def write_output(folder: Path, *, stems: dict[str, str] | None = None, steps: tuple[int, ...] = STEPS, px: int = 32) -> State:
    """Lay out pictures and evaluations, and give what is known of the run besides."""
    stems = STEMS if stems is None else stems
    (folder / "validation_images").mkdir(parents=True)
    for at, (label, step) in enumerate([("base", 0), *((f"step_{step:05d}", step) for step in steps)]):
        for number, (stem, prompt) in enumerate(stems.items()):
            image = Image.effect_noise((px, px), 90).convert("RGB") if px > 64 else Image.new("RGB", (px, px), (40 * at, 60 * number, 90))
            facts = {"prompt": prompt, "negative_prompt": "", "seed": "7", "step": str(step)}
            write_picture(folder / "validation_images" / f"{label}_{stem}.png", image, facts)
        write_picture(folder / "validation_images" / f"{label}_grid.png", Image.new("RGB", (8, 8)), {})
    rows = [
        {"step": step, "loss/val/held": 1 + abs(40 - step) / 50, "loss/val/held/noise_0-25": 1.0, "clip/mean": 20 + step / 10} for step in (0, *steps)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made_up(folder)


def made_up(folder: Path) -> State:
    """What is known of a run of 60 steps that is over."""
    state = State(began=1.7e9, updated=1.7e9 + 90, status="finished", step=60, total_steps=60, epoch=3.0)
    for step in range(1, 61):
        state.figures(step, {"train_loss": 1 + math.sin(step) / step, "grad_norm": 4.0 + step / 60, "learning_rate": 1e-4, "epoch": 3.0})
        state.curve("seconds").add(step, 0.5)
    for phase, seconds in (("loading", 4.0), ("training", 60.0), ("validation", 26.0)):
        state.spend(phase, seconds)
    for at in range(0, 90, 5):
        for name in ("main", "card"):
            state.memory.setdefault(name, Curve()).add(at, 2e9 + at * 1e7)
    for step in (20, 40, 60):
        (folder / f"checkpoint-{step}").mkdir()
        state.checkpoints[step] = f"checkpoint-{step}"
    state.warn(1.7e9, f"beware of {NASTY}")
    settings = {"learning_rate": 1e-4, "validation_prompt": NASTY, "seed": 7, "webhook_config": None}
    state.facts = dict.fromkeys(("base", "device", "start", "software"), "x") | {
        "name": NASTY,
        "output": "output",
        "where": "",
        "family": "auraflow",
        "learns": "lokr",
        "metric": "loss",
        "max_grad_norm": 1.0,
        "total_steps": 60,
        "images_per_step": 2,
        "steps_per_epoch": 20.0,
        "is_adapter": True,
        "settings": settings,
        "origins": {"learning_rate": "config.json", "validation_prompt": "config.json", "seed": "default"},
        "planned": [{"name": "step", "card_bytes": 3_000_000_000, "main_bytes": 4_000_000_000}],
        "datasets": [{"id": NASTY, "role": "trained", "images": 9, "repeats": 1, "buckets": [["32x32", 9]], "skipped": {"small": 2}, "about": ""}],
    }
    state.previous = {**settings, "learning_rate": 3e-4}
    state.crops = [
        {
            "dataset": NASTY,
            "file": "a.png",
            "caption": NASTY,
            "thumbnail": "",
            "original": [9, 9],
            "resized": [48, 32],
            "crop": [8, 0, 32, 32],
            "bucket": "32x32",
        }
    ]
    return state
