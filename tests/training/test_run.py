"""A whole run: what it leaves, that other software reads it, and what its caches do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import AuraFlowPipeline
from lycoris import create_lycoris_from_weights
from PIL import Image
from safetensors import safe_open

from tests.builders.run import adapter_bytes, add_pictures, train_in_process, write_run
from tests.builders.shards import damage_entries, entries_in

LOOKING = {
    "validation_prompt": "a picture",
    "validation_negative_prompt": "noise",
    "validation_step_interval": 3,
    "validation_num_inference_steps": 2,
    "validation_guidance": 3.0,
    "validation_resolution": "32,48x32",
    "validation_seed": 11,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encoded(said: str, what: str) -> int:
    """How many captions or images a run says that it encoded; 0 if it says nothing."""
    found = re.findall(rf"{what}: \d+/(\d+)", said)
    return int(found[-1]) if found else 0


def plain_pipeline(folder: Path) -> AuraFlowPipeline:
    pipeline = AuraFlowPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render(pipeline: AuraFlowPipeline, width: int) -> numpy.ndarray:
    image = pipeline(
        prompt="a picture",
        negative_prompt="noise",
        width=width,
        height=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    return numpy.asarray(image)


def shown(folder: Path, label: str, size: str) -> numpy.ndarray:
    return numpy.asarray(Image.open(folder / "output" / "validation_images" / f"{label}_validation_11_{size}.png"))


def test_validation_shows_what_diffusers_and_lycoris_render_without_us(tmp_path):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path) == 0
    pipeline = plain_pipeline(tmp_path)
    base = {size: render(pipeline, width) for size, width in (("32x32", 32), ("48x32", 48))}

    network, weights = create_lycoris_from_weights(1.0, str(tmp_path / "output" / "pytorch_lora_weights.safetensors"), pipeline.transformer)
    for module in network.loras:
        module.bypass_mode = True
    network.apply_to()
    adapted = {size: render(pipeline, width) for size, width in (("32x32", 32), ("48x32", 48))}

    assert {key.split(".")[0] for key in weights} == {module.lora_name for module in network.loras}  # nothing missing, nothing unused
    for size in base:
        assert numpy.array_equal(shown(tmp_path, "base", size), base[size])
        assert numpy.array_equal(shown(tmp_path, "step_00006", size), adapted[size])
        assert not numpy.array_equal(adapted[size], base[size])


def test_an_adapter_at_strength_0_renders_the_base_bit_for_bit(tmp_path):
    write_run(tmp_path, validation_lycoris_strength=0.0, **LOOKING)
    assert train_in_process(tmp_path) == 0

    for size in ("32x32", "48x32"):
        assert numpy.array_equal(shown(tmp_path, "step_00006", size), shown(tmp_path, "base", size))


def test_a_picture_tells_its_prompt_seed_and_step(tmp_path):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path) == 0

    facts = Image.open(tmp_path / "output" / "validation_images" / "step_00006_validation_11_32x32.png").text

    assert (facts["prompt"], facts["negative_prompt"], facts["seed"], facts["step"]) == ("a picture", "noise", "11", "6")


def test_a_prompt_library_names_its_pictures_safely(tmp_path):
    (tmp_path / "library.json").write_text(json.dumps({"../up/and away": "a", "кот": {"prompt": "b"}, "x" * 300: "c"}))
    write_run(tmp_path, user_prompt_library="library.json", **{**LOOKING, "validation_resolution": "32"})
    assert train_in_process(tmp_path) == 0

    names = {path.name for path in (tmp_path / "output" / "validation_images").glob("base_*_11_32x32.png")}

    assert names == {f"base_{name}_11_32x32.png" for name in ("validation", "up_and_away", "кот", "x" * 80)}


def test_the_snippet_at_the_end_runs(tmp_path, capsys, monkeypatch):
    write_run(tmp_path, **LOOKING)
    assert train_in_process(tmp_path) == 0
    code = capsys.readouterr().out.split("Use it with diffusers:")[1]
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "snippet", "exec"), {})

    assert numpy.array_equal(numpy.asarray(Image.open("picture.png")), shown(tmp_path, "step_00006", "32x32"))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_type": "standard", "lycoris_config": None},
        {"use_ema": True},
        {"model_type": "full", "lora_type": None, "lycoris_config": None, "learning_rate": 1e-3},
    ],
    ids=["plain LoRA", "averaged", "all weights"],
)
def test_the_snippet_shows_what_validation_showed_last(tmp_path, capsys, monkeypatch, options):
    write_run(tmp_path, **LOOKING, **options)
    assert train_in_process(tmp_path) == 0
    code = capsys.readouterr().out.split("Use it with diffusers:")[1]
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "snippet", "exec"), {})

    difference = numpy.abs(numpy.asarray(Image.open("picture.png")).astype(int) - shown(tmp_path, "step_00006", "32x32").astype(int))
    assert difference.max() <= 1


def test_damaged_text_entries_are_made_again_and_named(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    whole = adapter_bytes(tmp_path)
    assert damage_entries(tmp_path / "cache" / "text") >= 6
    shutil.rmtree(tmp_path / "output")
    capsys.readouterr()

    assert train_in_process(tmp_path) == 0

    assert capsys.readouterr().out.count("are damaged and are made again") >= 6
    assert adapter_bytes(tmp_path) == whole


def test_a_model_trained_whole_loads_as_a_pipeline(tmp_path):
    write_run(tmp_path, model_type="full", lora_type=None, lycoris_config=None, learning_rate=1e-3, **LOOKING)
    assert train_in_process(tmp_path) == 0

    pipeline = AuraFlowPipeline.from_pretrained(tmp_path / "output" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)

    assert numpy.array_equal(render(pipeline, 32), shown(tmp_path, "step_00006", "32x32"))


def test_training_from_random_weights_starts_from_the_seed_and_not_from_the_file(tmp_path):
    options = {"model_type": "full", "model_init": "random", "lora_type": None, "lycoris_config": None, "max_train_steps": 1}
    for name in ("one", "two"):
        write_run(tmp_path / name, **options)
    (tmp_path / "two" / "model" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()

    assert train_in_process(tmp_path / "one") == train_in_process(tmp_path / "two") == 0

    weights = "output/pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()


def test_the_adapter_file_says_where_it_comes_from(tmp_path):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0

    with safe_open(tmp_path / "output" / "pytorch_lora_weights.safetensors", "pt") as file:
        facts = file.metadata()

    assert facts["model_family"] == "auraflow" and facts["step"] == "6" and json.loads(facts["lycoris_config"])["algo"] == "lokr"


def test_adding_pictures_encodes_only_them(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    first = capsys.readouterr().out
    add_pictures(tmp_path / "pictures", 3, first=50)

    assert train_in_process(tmp_path, "--max_train_steps", "7") == 0

    said = capsys.readouterr().out
    assert (encoded(first, "latents"), encoded(first, "text embeddings")) == (6, 7)  # the captions and the empty one
    assert (encoded(said, "latents"), encoded(said, "text embeddings")) == (3, 3)
    assert "3 new" in said


def test_editing_one_picture_or_one_caption_encodes_exactly_that(tmp_path, capsys):
    data = {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "textfile"}
    add_pictures(tmp_path / "pictures", 6)
    for path in (tmp_path / "pictures").glob("*.png"):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}")
    write_run(tmp_path, datasets=[data])
    assert train_in_process(tmp_path) == 0
    capsys.readouterr()

    (tmp_path / "pictures" / "picture_002.txt").write_text("something else")
    assert train_in_process(tmp_path, "--max_train_steps", "7") == 0
    after_caption = capsys.readouterr().out
    Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / "picture_003.png")
    assert train_in_process(tmp_path, "--max_train_steps", "8") == 0
    after_picture = capsys.readouterr().out

    assert (encoded(after_caption, "latents"), encoded(after_caption, "text embeddings")) == (0, 1)
    assert (encoded(after_picture, "latents"), encoded(after_picture, "text embeddings")) == (1, 0)


def test_another_vae_makes_new_latents_and_leaves_the_old_ones(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    entries = {path: path.read_bytes() for path in (tmp_path / "cache" / "vae").rglob("*.safetensors")}
    shutil.copytree(tmp_path / "model", tmp_path / "first")
    config = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = bytearray(config.read_bytes())
    weights[-1] ^= 1
    config.write_bytes(weights)
    capsys.readouterr()

    assert train_in_process(tmp_path, "--max_train_steps", "7") == 0

    assert encoded(capsys.readouterr().out, "latents") == 6
    assert all(path.read_bytes() == content for path, content in entries.items())


def test_a_damaged_cache_entry_is_made_again_and_named(tmp_path, capsys):
    write_run(tmp_path)
    assert train_in_process(tmp_path) == 0
    whole = entries_in(tmp_path / "cache" / "vae")
    assert damage_entries(tmp_path / "cache" / "vae") == len(whole) == 6
    capsys.readouterr()

    assert train_in_process(tmp_path, "--max_train_steps", "12") == 0

    assert "damaged" in capsys.readouterr().out
    after = entries_in(tmp_path / "cache" / "vae")
    assert after.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key][name]) for key, row in after.items() for name, tensor in row.items())


def test_regularisation_pictures_keep_the_model_where_it_was(tmp_path):
    """With nothing but regularisation data the target is what the adapter at zero answers, so nothing is learned."""
    data = {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename", "is_regularisation_data": True}
    write_run(tmp_path, datasets=[data], report_to="jsonl")
    assert train_in_process(tmp_path) == 0

    losses = [json.loads(line).get("train_loss") for line in (tmp_path / "output" / "logs" / "metrics.jsonl").read_text().splitlines()]

    assert losses == [0.0] * 6


def test_a_dry_run_says_everything_and_loads_nothing(tmp_path, capsys):
    write_run(tmp_path)

    assert train_in_process(tmp_path, "--dry-run", "--learning_rate", "5e-5") == 0

    said = capsys.readouterr().out
    assert "learning_rate" in said and "flag --learning_rate" in said and "config.json" in said
    assert not (tmp_path / "output").exists() and not (tmp_path / "cache").exists()
