"""The files of the quickstarts as their readers have them, on small models and made pictures of the sizes that they ask for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
from PIL import Image

from simpletuner.cli.main import main
from tests.builders.auraflow import build_tiny_auraflow
from tests.builders.stable_diffusion import build_tiny_sdxl

QUICKSTARTS = Path(__file__).parents[1] / "options" / "quickstarts"
SHORT = ["--max_train_steps", "1", "--validation_num_inference_steps", "1", "--disable_benchmark", "true"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def save(folder: str, name: str, width: int, height: int) -> None:
    """A picture of soft shapes, as a JPEG."""
    low = numpy.random.default_rng(width * height).integers(0, 256, (4, 6, 3), dtype=numpy.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC).save(Path(folder, name), quality=90)


def train(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    code = main(["train", *SHORT, *arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return " ".join(said.out.split())


@pytest.mark.slow
def test_auraflows_quickstart_trains_on_what_it_names(capsys):
    """1024 px, squares of large pictures for regularisation, the subject in its own shapes, an int8 base, LoKr, Lion."""
    Path("config/auraflow").mkdir(parents=True)
    for name, place in (("config", "config"), ("lycoris_config", "config"), ("multidatabackend", "config/auraflow")):
        shutil.copy(QUICKSTARTS / "auraflow" / f"{name}.json", place)
    for number, (width, height) in enumerate([(1600, 1200), (1100, 1300), (1024, 1024), (800, 600)]):
        save("datasets/pseudo-camera-10k", f"a_street_{number}.jpg", width, height)
    for number, (width, height) in enumerate([(1200, 1200), (1500, 1000)]):
        save("datasets/dreambooth-subject", f"{number}.jpg", width, height)
    build_tiny_auraflow(Path("model"), patch_size=8, positions=48 * 48)

    said = train(capsys, "--pretrained_model_name_or_path", "model")

    assert "1 (a_street_3.jpg) skipped, too small" in said
    assert "dataset pseudo-camera-10k-auraflow 3 images in 1 bucket (1024x1024 x3); regularisation" in said
    assert "dataset dreambooth-subject 2 images in 2 buckets (1024x1024 x1, 1280x832 x1); 1000 repeats" in said
    assert Path("output/models-auraflow/pytorch_lora_weights.safetensors").is_file()
    assert list(Path("cache/text/auraflow").glob("shard-*")) and list(Path("cache/vae/auraflow").glob("*/shard-*"))


@pytest.mark.slow
def test_sdxls_quickstart_trains_on_what_it_names(capsys):
    """Random 1-megapixel crops out of pictures brought down to 1 megapixel, named as captions."""
    Path("config").mkdir()
    shutil.copy(QUICKSTARTS / "sdxl" / "config.json", "config")
    [pictures, texts] = json.loads((QUICKSTARTS / "sdxl" / "multidatabackend.json").read_text())
    pictures["instance_data_dir"] = "datasets/pseudo-camera-10k"  # the quickstart has a path of its reader's
    Path("config/multidatabackend.json").write_text(json.dumps([pictures, texts]))
    for number, (width, height) in enumerate([(1600, 1200), (700, 900), (400, 300)]):
        save("datasets/pseudo-camera-10k", f"a_street_{number}.jpg", width, height)
    build_tiny_sdxl(Path("model"))

    places = ["--pretrained_model_name_or_path", "model", "--output_dir", "output", "--data_backend_config", "config/multidatabackend.json"]
    said = train(capsys, *places, "--aspect_bucket_alignment", "64")  # as of the released model

    assert "1 (a_street_2.jpg) skipped, too small" in said
    assert "2 images in 1 bucket (1024x1024 x2)" in said
