"""The recipes of diffusers' text-to-image scripts, as they are shipped: what the importer makes of the command in their README."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.cli.commands.train import read_options
from simpletuner.cli.locate import examples, find_config
from simpletuner.cli.main import main
from simpletuner.data.plan import load_plan
from simpletuner.importers.diffusers_scripts import SCRIPTS
from simpletuner.relaxed_json import load_relaxed
from tests.training.families import model

RECIPES = {name: folder for name, folder in examples().items() if name.startswith("text-to-image")}


def command_of(folder: Path) -> str:
    match = re.search(r"```bash\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert match
    return match[1]


def test_there_is_one_for_every_text_to_image_script():
    found = {re.search(r"train_\w+\.py", command_of(folder))[0] for folder in RECIPES.values()}

    assert found == {name for name in SCRIPTS if name.startswith("train_text_to_image")}


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_the_importer_makes_of_its_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert main(["import", "diffusers", "--output", "made", "--", command_of(RECIPES[name])]) == 0

    shipped = load_relaxed(RECIPES[name] / "config.json")
    made = {**load_relaxed(Path("made/config.json")), "data_backend_config": "{example}/multidatabackend.json"}
    assert shipped == made
    assert load_relaxed(RECIPES[name] / "multidatabackend.json") == load_relaxed(Path("made/multidatabackend.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_read_without_a_problem_and_all_of_it_has_an_effect(name):
    pytest.importorskip("datasets")
    loaded = read_options(find_config(None, name, None, {}), [])

    assert not loaded.notes
    data = loaded.config.data
    variables = {"model_family": loaded.config.models.model_family, "output_dir": "output", "example": str(RECIPES[name])}
    plan = load_plan(data.data_backend_config, data, variables, alignment_px=64)
    assert not plan.notes and len(plan.datasets) == 1


def test_a_copy_of_one_trains_on_rows_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    images = []
    for shade in (10, 90, 170, 250):
        file = io.BytesIO()
        Image.new("RGB", (40, 36), (shade, 0, 99)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"image": images, "text": ["a", "b", "c", "d"]}), "rows.parquet")
    assert main(["examples", "copy", "text-to-image-lora"]) == 0
    place = Path("config/text-to-image-lora/multidatabackend.json")
    place.write_text(
        json.dumps([{**entry, **({"dataset_name": "rows.parquet"} if "dataset_name" in entry else {})} for entry in load_relaxed(place)])
    )
    small = {
        "pretrained_model_name_or_path": model("sd1x"),
        "mixed_precision": "no",
        "vae_dtype": "fp32",
        "resolution": 32,
        "num_train_epochs": 0,
        "max_train_steps": 2,
        "validation_resolution": 32,
        "validation_num_inference_steps": 2,
        "num_validation_images": 1,
    }

    assert main(["train", "--env", "text-to-image-lora", *(f"--{key}={value}" for key, value in small.items())]) == 0

    assert Path("output/sd-naruto-lora/pytorch_lora_weights.safetensors").is_file()
