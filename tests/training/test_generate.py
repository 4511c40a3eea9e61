"""`simpletuner generate`: the pictures that validation made, pixel for pixel, and any other with any adapter file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from simpletuner.adapters.effect import FileEffect
from simpletuner.adapters.reading import read_changes
from simpletuner.cli.main import main
from simpletuner.models.usual import UsualFamily
from simpletuner.training.export import export
from simpletuner.training.finished import Finished, open_finished
from simpletuner.training.generate import plan
from simpletuner.training.probe import make_probe
from simpletuner.training.prompts import Picture
from simpletuner.types import Size
from tests.builders.finished import write_finished
from tests.builders.run import ROOT, train_in_process, write_run
from tests.builders.single_file import write_sd1
from tests.training.families import model, options_of

LOOKING = {
    "max_train_steps": 3,
    "validation_prompt": "a picture",
    "validation_negative_prompt": "blurry",
    "validation_resolution": "32,40x32",
    "validation_num_inference_steps": 3,
    "validation_step_interval": 3,
    "validation_seed": 5,
    "num_validation_images": 2,
    "disable_benchmark": True,
}
PRESET = {"target_module": ["Attention", "FeedForward"]}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def generate(folder: Path, *words: str) -> int:
    """Run the command in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return main(["generate", *words])
    finally:
        os.chdir(before)


def pixels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path).convert("RGB"))


def pictures_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


class Silent:
    def say(self, text: str) -> None:
        pass


RUNS: dict[str, dict[str, Any]] = {
    "AuraFlow, LoKr": {},
    "AuraFlow, LoKr on a quantised base in bf16": {"base_model_precision": "int8-torchao", "mixed_precision": "bf16"},
    "SD 1.x, LoRA": {**options_of("sd1x"), "lora_type": "standard", "learning_rate": 1e-3},
    "SD 1.x, all weights": {**options_of("sd1x"), "model_type": "full", "learning_rate": 1e-4, "mixed_precision": "bf16"},
    "AuraFlow, an average": {"use_ema": True, "ema_decay": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_pictures_of_the_last_validation_come_out_again_pixel_for_pixel(tmp_path, name, capfd):
    """By the line that the run itself ends with."""
    write_run(tmp_path, **{**LOOKING, **RUNS[name]})
    assert train_in_process(tmp_path) == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if "simpletuner generate" in line)

    assert generate(tmp_path, *shlex.split(line)[2:]) == 0

    images = tmp_path / "output" / "validation_images"
    for seed in (5, 6):
        for size in ("32x32", "40x32"):
            shown, made = images / f"step_00003_validation_{seed}_{size}.png", tmp_path / "generated" / f"a_picture_{seed}_{size}.png"
            assert (pixels(shown) == pixels(made)).all()
            said, before = Image.open(made).text, Image.open(shown).text
            assert {key: said[key] for key in before if key != "step"} == {key: value for key, value in before.items() if key != "step"}
            assert said["prompt"] == "a picture" and said["seed"] == str(seed) and not any(str(tmp_path) in value for value in said.values())
    if "adapter" in said:
        assert generate(tmp_path, *shlex.split(line)[2:], "--strength", "0", "-n", "1", "--size", "32", "--output", "base") == 0
        assert (pixels(tmp_path / "base" / "a_picture_5_32x32.png") != pixels(images / "step_00003_validation_5_32x32.png")).any()


def test_a_checkpoint_of_all_weights_makes_the_pictures_of_its_step(tmp_path):
    write_run(tmp_path, **{**LOOKING, **RUNS["SD 1.x, all weights"], "max_train_steps": 4, "checkpoint_step_interval": 3})
    assert train_in_process(tmp_path) == 0

    assert generate(tmp_path, "--adapter", "output/checkpoint-3", "--output", "out") == 0

    shown = tmp_path / "output" / "validation_images" / "step_00003_validation_5_32x32.png"
    assert (pixels(shown) == pixels(tmp_path / "out" / "validation_5_32x32.png")).all()


def test_a_run_from_a_single_file_ends_with_a_line_that_works(tmp_path, capfd):
    write_run(tmp_path, **{**LOOKING, **RUNS["SD 1.x, LoRA"], "single_file_base_model": "model", "pretrained_model_name_or_path": "one.safetensors"})
    write_sd1(model("sd1x"), tmp_path / "one.safetensors")
    assert train_in_process(tmp_path, f"--pretrained_model_name_or_path={tmp_path / 'one.safetensors'}") == 0
    said = capfd.readouterr().out
    line = next(line for line in said.splitlines() if "simpletuner generate" in line)

    assert "--pretrained_model_name_or_path" in line and "Use it with diffusers" not in said
    assert generate(tmp_path, *shlex.split(line)[2:]) == 0
    shown = tmp_path / "output" / "validation_images" / "step_00003_validation_5_32x32.png"
    assert (pixels(shown) == pixels(tmp_path / "generated" / "a_picture_5_32x32.png")).all()

    (tmp_path / "one.safetensors").unlink()
    assert generate(tmp_path, "a cat", "--adapter", "output") == 2
    assert "names no absolute paths" in capfd.readouterr().err


def finished_run(folder: Path, family: str = "sd1x", **options: Any) -> Finished:
    config = write_finished(folder, size=0.2, mixed_precision="no", pretrained_model_name_or_path=str(model(family)), model_family=family, **options)
    return open_finished(folder, config, has_settings=True)


SMALL = ("--size", "32", "--steps", "2", "--mixed_precision", "no")


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffusers", "lycoris"])
def test_a_file_of_any_layout_alone_makes_nearly_the_pictures_of_its_run(tmp_path, layout):
    finished = finished_run(tmp_path / "run", lora_type="standard", lora_alpha=6.0)
    export(finished, layout, tmp_path / "alone" / "file.safetensors", checks=False, console=Silent())
    place = ("--pretrained_model_name_or_path", str(model("sd1x")))

    assert generate(tmp_path, "a cat", "--adapter", "run", *place, *SMALL, "--output", "a") == 0
    assert generate(tmp_path, "a cat", "--adapter", "alone/file.safetensors", *place, *SMALL, "--output", "b", "--strength", "1,0") == 0
    assert generate(tmp_path, "a cat", "--model_family", "sd1x", *place, *SMALL, "--output", "c") == 0

    of_run, of_file = pixels(tmp_path / "a/a_cat_42_32x32.png").astype(int), pixels(tmp_path / "b/a_cat_42_32x32_strength_1.png").astype(int)
    base = pixels(tmp_path / "c/a_cat_42_32x32.png")
    assert abs(of_run - of_file).max() <= 1 < abs(of_run - base).max()
    assert (pixels(tmp_path / "b/a_cat_42_32x32_strength_0.png") == base).all()
    assert (tmp_path / "b" / "grid.png").is_file()


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 6.0},
    "dora": {"lora_type": "standard", "lora_rank": 4, "use_dora": True},
    "lokr": {"lycoris": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1.5, "factor": 4, "apply_preset": PRESET}},
    "full": {"lycoris": {"algo": "full", "apply_preset": {"target_module": ["ResnetBlock2D"]}}},
    "diag-oft": {"lycoris": {"algo": "diag-oft", "linear_dim": 4, "rescaled": True, "apply_preset": PRESET}},
    "ia3": {"lycoris": {"algo": "ia3", "apply_preset": PRESET}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_read_beside_the_layers_changes_the_answer_as_training_had_it(tmp_path, kind):
    finished = finished_run(tmp_path / "run", **KINDS[kind])
    probe, denoiser = make_probe(finished.family, finished.config.diffusion), finished.base()
    base, trained = probe(denoiser), probe(finished.trained())
    effect = FileEffect(read_changes(tmp_path / "run", finished.layout, "U-Net"))
    effect.attach(denoiser)

    full = probe(denoiser)
    effect.set_strength(0.0)
    none = probe(denoiser)

    assert (full - trained).abs().max() < 1e-3 * (trained - base).abs().max()
    assert torch.equal(none, base)


def test_a_file_alone_can_be_put_on_a_quantised_base(tmp_path):
    finished_run(tmp_path / "run", lora_type="standard")
    (tmp_path / "run" / "simpletuner_config.json").unlink()
    precisions = ("--base_model_precision", "int8-torchao", "--text_encoder_1_precision", "int8-torchao")
    place = ("--pretrained_model_name_or_path", str(model("sd1x")), *precisions)

    assert generate(tmp_path, "a cat", "--adapter", "run", *place, *SMALL, "--strength", "1,0") == 0

    one, none = (tmp_path / "generated" / f"a_cat_42_32x32_strength_{strength}.png" for strength in (1, 0))
    assert (pixels(one) != pixels(none)).any()
    assert Image.open(one).text["base_model_precision"] == "int8-torchao"


def test_prompts_come_from_words_and_files_and_nothing_is_overwritten_unasked(tmp_path, capfd):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n", encoding="utf-8")
    (tmp_path / "prompts.json").write_text(json.dumps({"bird": "a bird", "fish": {"prompt": "a fish"}}))
    place = ("--model_family", "sd1x", "--pretrained_model_name_or_path", str(model("sd1x")), *SMALL)

    assert generate(tmp_path, *place, "a cat", "--prompts", "prompts.txt", "a cat") == 0
    assert [path.name for path in pictures_in(tmp_path / "generated")] == [
        "001_a_cat_42_32x32.png",
        "003_a_dog_42_32x32.png",
        "a_cat_42_32x32.png",
        "a_cat__42_32x32.png",
    ]
    assert generate(tmp_path, *place, "--prompts", "prompts.json", "--output", "json", "-n", "2", "--seed", "7") == 0
    assert [path.name[:6] for path in pictures_in(tmp_path / "json")] == ["bird_7", "bird_8", "fish_7", "fish_8"]
    before = {path: path.read_bytes() for path in pictures_in(tmp_path / "json")}
    capfd.readouterr()

    assert generate(tmp_path, *place, "--prompts", "prompts.json", "--output", "json", "--seed", "7", "--steps", "1") == 0
    assert "2 pictures of these names are there and stay; the new ones get a number" in capfd.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items()) and len(pictures_in(tmp_path / "json")) == 6

    assert generate(tmp_path, *place, "--prompts", "prompts.json", "--output", "json", "--seed", "7", "--steps", "1", "--overwrite") == 0
    assert "will be replaced" in capfd.readouterr().out
    assert (tmp_path / "json" / "bird_7_32x32.png").read_bytes() == (tmp_path / "json" / "bird_7_32x32-2.png").read_bytes()


OF_MODEL = ("--model_family", "sd1x", "--pretrained_model_name_or_path", "MODEL")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing says which model"),
        (["a cat", "--model_family", "sd1x"], "how large"),
        (["a cat", "--model_family", "sdx", "--size", "32"], "no known family"),
        (["a cat", "--model_family", "sd1x", "--size", "32", "--gudance", "3"], "no flag --gudance"),
        ([*OF_MODEL, "--size", "32"], "there is no prompt"),
        (["a cat", *OF_MODEL, "--size", "32", "--strength", "0.5"], "there is no adapter"),
        (["a cat", *OF_MODEL, "--size", "32", "--strength", "lots"], "several with commas"),
        (["a cat", *OF_MODEL, "--size", "huge"], "not a size"),
        (["a cat", *OF_MODEL, "--size", "32", "--steps", "few"], "whole number"),
        (["a cat", *OF_MODEL, "--size", "32", "--prompts", "no.txt"], "cannot be read"),
        ([*OF_MODEL, "--size", "32", "--prompts", "empty.txt"], "--prompts empty.txt has no prompt in it"),
        ([*OF_MODEL, "--size", "32", "--prompts", "empty.json"], "--prompts empty.json has no prompt in it"),
        (["a cat", *OF_MODEL, "--size", "32", "--validation_resolution", "64"], "--size 32 and --validation_resolution 64 say the same thing"),
        (["a cat", "--adapter", "nothing"], "does not exist"),
    ],
)
def test_what_cannot_be_rendered_is_refused_before_anything_is_loaded(tmp_path, words, said, capfd):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "empty.json").write_text("{}")

    assert generate(tmp_path, *(str(model("sd1x")) if word == "MODEL" else word for word in words)) == 2

    assert said in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "generated").exists()


def test_words_without_dashes_are_prompts_and_options_of_validation_are_taken_by_their_own_names(tmp_path):
    own = ("--validation_resolution", "32", "--validation_num_inference_steps=1", "--validation_seed=5", "--mixed_precision", "no")

    line = ["style=anime", "--model_family", "sd1x", "--pretrained_model_name_or_path", str(model("sd1x")), *own, "seed = 3"]
    assert generate(tmp_path, *line) == 0

    made = {Image.open(path).text["prompt"]: path for path in pictures_in(tmp_path / "generated")}
    assert made.keys() == {"style=anime", "seed = 3"} and all(path.stem.endswith("_5_32x32") for path in made.values())


def test_what_is_given_without_effect_and_a_size_that_is_rounded_are_said(tmp_path, capfd):
    flux = ("--model_family", "flux", "--pretrained_model_name_or_path", str(model("flux")), "--tokenizer_max_length", "24", *SMALL)
    Image.new("RGB", (32, 32)).save(tmp_path / "start.png")

    assert generate(tmp_path, "a cat", *flux, "--size", "41x32, 32", "--negative_prompt", "blurry", "--image", "start.png") == 0

    said = " ".join(capfd.readouterr().out.split())
    assert "note: validation_negative_prompt has no effect: it needs a validation_guidance_real above 1" in said
    assert "note: validation_start_image has no effect: they are for the refiner" in said
    assert said.count("becomes") == 1 and "note: size 41x32 becomes 40x32: sides are multiples of " in said
    assert generate(tmp_path, "a cat", *flux, "--negative_prompt", "blurry", "--validation_guidance_real", "2", "--output", "real") == 0
    assert "no effect" not in capfd.readouterr().out


def test_an_adapter_for_another_model_is_refused(tmp_path, capfd):
    finished_run(tmp_path / "run", lora_type="standard")
    (tmp_path / "run" / "simpletuner_config.json").unlink()

    line = ["a cat", "--adapter", "run", "--model_family", "auraflow", "--pretrained_model_name_or_path", str(model("auraflow")), "--size", "32"]
    assert generate(tmp_path, *line) == 2

    assert "is no adapter for AuraFlowTransformer2DModel" in " ".join(capfd.readouterr().err.split())


def test_the_text_encoders_are_gone_when_the_denoiser_comes(tmp_path, monkeypatch):
    loaded: list[Any] = []
    counted: list[int] = []
    load_text, load_frozen = UsualFamily.load_text_encoders, UsualFamily.load_frozen

    def keep(*arguments: Any) -> Any:
        loaded.append(load_text(*arguments))
        return loaded[-1]

    def count(*arguments: Any) -> Any:
        counted.append(sum(parameter.numel() for text in loaded[0] for parameter in text.encoder.parameters()))
        return load_frozen(*arguments)

    monkeypatch.setattr(UsualFamily, "load_text_encoders", keep)
    monkeypatch.setattr(UsualFamily, "load_frozen", count)

    line = ["--model_family", "sd1x", "--pretrained_model_name_or_path", str(model("sd1x")), *SMALL]
    assert generate(tmp_path, "a cat", "a dog", *line) == 0

    assert len(loaded) == 1 and counted == [0]


def test_files_of_alike_names_get_numbers():
    picture = Picture("x", "x", "", Size(32, 32), 1)

    jobs = plan([picture, picture], [1.0], Path("nowhere"), overwrites=True)

    assert [job.file.name for job in jobs] == ["x_1_32x32.png", "x_1_32x32-2.png"]


@pytest.mark.parametrize(("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_rendered_and_has_its_exit_code(tmp_path, number, code):
    shutil.copytree(model("sd1x"), tmp_path / "model")
    line = [sys.executable, "-m", "simpletuner", "generate", "a cat", "--model_family", "sd1x", "--pretrained_model_name_or_path", "model"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*line, "--size", "32", "--steps", "20", "-n", "500", "--mixed_precision", "no"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    while len(pictures_in(tmp_path / "generated")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)

    process.send_signal(number)
    output, _ = process.communicate(timeout=60)

    made = pictures_in(tmp_path / "generated")
    assert process.returncode == code, output
    assert f"stopped: {len(made)} of 500 pictures are made" in output and "They are in generated" in output
    assert len(made) >= 2 and all(Image.open(path).size == (32, 32) for path in made)
    assert not list((tmp_path / "generated").glob("*.tmp")) and "Traceback" not in output
