"""Folders of drawn landscapes with everything that a dataset can have wrong, for the doctor's tests and its picture in the docs."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from simpletuner.data.doctor.findings import ModelFacts

MODEL = ModelFacts(text_tokens=24, latent_channels=4, stride_px=8, text_bytes=1000)
"""Some model of which no tokenizer is at hand."""

PALETTES = (
    ((28, 46, 92), (235, 150, 92), (40, 52, 70)),
    ((120, 180, 230), (240, 246, 250), (62, 110, 70)),
    ((20, 20, 46), (90, 60, 120), (24, 26, 40)),
    ((250, 190, 120), (255, 236, 190), (150, 84, 52)),
    ((90, 160, 170), (226, 240, 214), (34, 84, 92)),
    ((70, 60, 110), (246, 180, 190), (88, 50, 84)),
)
THINGS = ("a lake", "pine trees", "a small house", "high mountains", "a full moon", "dunes", "a red sail")


def landscape(width: int, height: int, seed: int) -> Image.Image:
    """Draw a sky, a sun, hills and trees, another picture for every seed."""
    draw_from = random.Random(seed)
    top, low, ground = draw_from.choice(PALETTES)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for y in range(height):
        share = y / height
        draw.line([(0, y), (width, y)], fill=tuple(round(a + (b - a) * share) for a, b in zip(top, low)))
    edge = min(width, height)
    x, y, radius = draw_from.uniform(0.15, 0.85) * width, draw_from.uniform(0.15, 0.45) * height, draw_from.uniform(0.06, 0.13) * edge
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tuple(min(255, c + 60) for c in low))
    for layer in range(3):
        shade = tuple(round(c * (1.25 - 0.3 * layer)) for c in ground)
        base, swing, wave, shift = height * (0.55 + 0.14 * layer), 0.09 * height, draw_from.uniform(1.5, 4.0), draw_from.uniform(0, 6.3)

        def crest(at: float, base: float = base, swing: float = swing, wave: float = wave, shift: float = shift) -> float:
            return base + swing * math.sin(at / width * wave * math.pi + shift)

        draw.polygon([(0, height), *((at, crest(at)) for at in range(0, width + 8, 8)), (width, height)], fill=shade)
        if layer == 1:
            for _ in range(draw_from.randint(4, 14)):
                at, size = draw_from.uniform(0, width), draw_from.uniform(0.05, 0.12) * edge
                foot = crest(at) + size * 0.2
                draw.polygon([(at - size * 0.35, foot), (at + size * 0.35, foot), (at, foot - size)], fill=tuple(round(c * 0.6) for c in ground))
    return image


def encoded(image: Image.Image, form: str = "PNG", **arguments: object) -> bytes:
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **arguments)
    return buffer.getvalue()


def save(image: Image.Image, path: Path, caption: str | None, **arguments: object) -> None:
    """Write a picture and the caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **arguments)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_demonstration(folder: Path) -> Path:
    """Write three datasets, one of them for evaluation, and give the path of their config.json.

    In `harbour`: 40 landscapes of six shapes, 3 broken files, an exact and two near copies, 2 small ones, a panorama, an overlong, an empty
    and a missing caption. In `portraits`: 18 tall ones under a square crop. In `held-out`: 6, of which one is also in `harbour`.
    """
    shapes = [(960, 640), (640, 960), (800, 800), (1024, 576), (720, 960), (880, 660)]
    harbour, portraits, held_out = (folder / "pictures" / name for name in ("harbour", "portraits", "held-out"))
    for number in range(40):
        width, height = shapes[number * number % len(shapes)]
        words = f"a painting of {THINGS[number % len(THINGS)]} at {('dawn', 'noon', 'dusk')[number % 3]}, picture {number}"
        save(landscape(width, height, number), harbour / f"view-{number:02d}.jpg", words, quality=88)
    save(landscape(960, 640, 0), harbour / "view-00 copy.jpg", "a painting of a lake", quality=88)
    save(landscape(960, 640, 0).resize((720, 480)), harbour / "view-00-small.png", "a lake, saved again")
    save(ImageEnhance.Brightness(landscape(*shapes[2 * 2 % 6], 2)).enhance(1.04), harbour / "view-02-edited.jpg", "brighter", quality=60)
    save(landscape(220, 180, 91), harbour / "tiny.png", "a tiny picture")
    save(landscape(300, 400, 92), harbour / "thumb.jpg", "a thumbnail")
    save(landscape(1800, 420, 93), harbour / "panorama.jpg", "a very wide view", quality=88)
    save(landscape(800, 800, 94), harbour / "wordy.jpg", " ".join(["an exceedingly detailed description of everything in view,"] * 40), quality=88)
    save(landscape(800, 800, 95), harbour / "silent.jpg", "", quality=88)
    save(landscape(800, 800, 96), harbour / "uncaptioned.jpg", None, quality=88)
    save(landscape(660, 880, 97), harbour / "海辺.jpg", "海辺の夕暮れ <b>bold</b> & \"quotes\" </script><script>alert('x')</script>", quality=88)
    (harbour / "empty.png").write_bytes(b"")
    (harbour / "cut off.jpg").write_bytes((harbour / "view-05.jpg").read_bytes()[:9000])
    (harbour / "no image.png").write_bytes(b"this is no image")
    for number in range(18):
        save(landscape(600 + 20 * (number % 4), 1000 + 60 * (number % 3), 200 + number), portraits / f"portrait_{number:02d}.jpg", None, quality=88)
    for number in range(5):
        save(landscape(900, 600, 300 + number), held_out / f"held_{number}.jpg", None, quality=88)
    (held_out / "view_seven.jpg").write_bytes((harbour / "view-07.jpg").read_bytes())
    common = {"type": "local", "resolution": 512, "resolution_type": "pixel_area"}
    datasets = [
        {"id": "portraits", "instance_data_dir": str(portraits), "caption_strategy": "filename", "crop": True, "crop_style": "center", **common},
        {"id": "harbour", "instance_data_dir": str(harbour), "caption_strategy": "textfile", "repeats": 1, **common},
        {"id": "held-out", "instance_data_dir": str(held_out), "caption_strategy": "filename", **common},
    ]
    (folder / "datasets.json").write_text(json.dumps(datasets, indent=2), encoding="utf-8")
    config = {"model_family": "auraflow", "data_backend_config": str(folder / "datasets.json"), "max_train_steps": 10, "train_batch_size": 4}
    (folder / "config.json").write_text(json.dumps({**config, "cache_dir": str(folder / "cache")}, indent=2), encoding="utf-8")
    return folder / "config.json"
