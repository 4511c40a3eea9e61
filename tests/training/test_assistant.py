"""The assistant adapter: in every training step and in no picture, below any adapter, and never in a file."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from simpletuner.adapters.applying import apply_changes
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.targets import layout_of
from simpletuner.cli.main import main
from simpletuner.errors import ConfigError, SimpleTunerError
from simpletuner.training.assemble import attach_adapter
from simpletuner.training.assistant import find_assistant
from simpletuner.training.assistant_rules import assistant_notes, location_of
from simpletuner.training.building import build_adapter, build_family
from simpletuner.training.probe import make_probe
from tests.builders.finished import config_of, write_finished
from tests.builders.flux import build_tiny_flux
from tests.builders.run import adapter_bytes, train_in_process, write_run

PRESET = {"target_module": ["Attention", "FeedForward"]}
LOOKING = {
    "validation_prompt": "a picture",
    "validation_resolution": "32",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 0,
    "validation_seed": 5,
    "checkpoint_step_interval": 1,
    "max_train_steps": 2,
}


@pytest.fixture(scope="module")
def schnell(tmp_path_factory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("models") / "schnell", guidance_embeds=False)


@pytest.fixture(scope="module")
def helper(tmp_path_factory, schnell) -> Path:
    """A LoRA that changes the model a good deal."""
    folder = tmp_path_factory.mktemp("helpers") / "helper"
    write_finished(folder, size=0.3, lora_type="standard", lora_rank=2, **of(schnell))
    return folder


def of(model: Path, **options: Any) -> dict[str, Any]:
    place = {"model_family": "flux", "pretrained_model_name_or_path": str(model), "tokenizer_max_length": 24}
    return {**place, "mixed_precision": "no", "disable_assistant_lora": False, **options}


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_type": "standard"},
    "lora on a quantised base": {"lora_type": "standard", "base_model_precision": "int8-torchao"},
    "lokr": {"lora_type": "lycoris", "lycoris_config": "lokr.json"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_the_base_while_training_and_not_in_pictures(tmp_path, monkeypatch, schnell, helper, kind):
    monkeypatch.chdir(tmp_path)
    Path("lokr.json").write_text(json.dumps({"algo": "lokr", "linear_dim": 10000, "factor": 4, "apply_preset": PRESET}))
    config = config_of(**of(schnell, assistant_lora_path=str(helper), assistant_lora_strength=0.5, **KINDS[kind]))
    family = build_family(config)
    probe, assistant = make_probe(family, config.diffusion), find_assistant(config, family)
    base = family.load_denoiser(torch.float32, 0)
    plain = probe(base)
    changes = read_changes(helper, layout_of(base, family.denoiser_folder, family.original_layout), "Flux")
    apply_changes(base, {layer: {**parts, "lora_up.weight": parts["lora_up.weight"] * 0.5} for layer, parts in changes.items()})
    expected, moved = probe(base), float((probe(base) - plain).abs().max())

    adapter = build_adapter(config, family)
    denoiser, *_ = attach_adapter(config, family, adapter, Accelerator(cpu=True), assistant)
    adapter.train(False)  # an adapter that has not been trained does nothing
    training = probe(denoiser)
    with assistant.in_pictures():
        pictures = probe(denoiser)
    adapter.set_strength(0.0)  # the parent of regularisation pictures is what the adapter was trained on
    parent = probe(denoiser)

    near = 0.2 if "quantised" in kind else 1e-3
    assert (training - expected).abs().max() < near * moved
    assert (pictures - plain).abs().max() < near * moved
    assert (parent - expected).abs().max() < near * moved
    adapter.save(tmp_path, {})
    assert {key.removesuffix(".alpha") for key in load_file(tmp_path / "pytorch_lora_weights.safetensors")}.isdisjoint(helper_tensors(helper))


def helper_tensors(helper: Path) -> set[bytes]:
    return {value.numpy().tobytes() for value in load_file(helper / "pytorch_lora_weights.safetensors").values()}


def write(folder: Path, model: Path, **options: Any) -> None:
    write_run(folder, model=model, model_family="flux", lora_type="standard", pictures=4, **LOOKING, **options)


def picture(folder: Path, label: str) -> bytes:
    [path] = (folder / "output/validation_images").glob(f"{label}_validation_*_32x32.png")
    return path.read_bytes()


def test_a_run_with_it_learns_something_else_shows_the_same_base_and_resumes_exactly(tmp_path, schnell, helper, capfd):
    write(tmp_path / "without", schnell)
    write(tmp_path / "with", schnell, assistant_lora_path=str(helper))
    assert train_in_process(tmp_path / "without") == 0 and train_in_process(tmp_path / "with") == 0
    assert "stands beside the base while training, at strength 1" in " ".join(capfd.readouterr().out.split())
    resumed = Path(shutil.copytree(tmp_path / "with", tmp_path / "resumed"))
    shutil.rmtree(resumed / "output/checkpoint-2")

    assert train_in_process(resumed, "--validation_disable=true") == 0

    before, after = (load_file(tmp_path / name / "output/pytorch_lora_weights.safetensors") for name in ("without", "with"))
    assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)
    assert picture(tmp_path / "without", "base") == picture(tmp_path / "with", "base")
    assert adapter_bytes(resumed) == adapter_bytes(tmp_path / "with")
    assert "changed since" not in capfd.readouterr().out

    shutil.rmtree(resumed / "output/checkpoint-2")
    assert train_in_process(resumed, "--assistant_lora_strength=0.5", "--validation_disable=true") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "the assistant adapter changed since the checkpoint" in said and "at strength 1 to" in said and "at strength 0.5" in said
    assert adapter_bytes(resumed) != adapter_bytes(tmp_path / "with")


def test_pictures_that_are_made_with_it_come_out_of_generate_again(tmp_path, schnell, helper, capfd, monkeypatch):
    write(tmp_path, schnell, assistant_lora_path=str(helper), assistant_lora_inference_strength=0.5)
    assert train_in_process(tmp_path, "--validation_step_interval=2", "--max_train_steps=2") == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if "simpletuner generate" in line)
    monkeypatch.chdir(tmp_path)

    assert main(shlex.split(line)[1:]) == 0

    [shown], [made] = Path("output/validation_images").glob("step_00002_validation_*_32x32.png"), Path("generated").glob("*.png")
    assert Image.open(shown).tobytes() == Image.open(made).tobytes()
    assert main([*shlex.split(line)[1:], "--assistant_lora_inference_strength=0", "--output", "without"]) == 0
    assert Image.open(next(Path("without").glob("*.png"))).tobytes() != Image.open(made).tobytes()


def test_schnell_and_turbo_have_one_of_their_own():
    def location(**options: Any) -> str | None:
        config = config_of(**options)
        return location_of(config, build_family(config))

    schnell = {"model_family": "flux", "model_flavour": "schnell"}
    assert location(**schnell) == "ostris/FLUX.1-schnell-training-adapter"
    assert location(model_family="flux", pretrained_model_name_or_path="black-forest-labs/FLUX.1-schnell") == location(**schnell)
    assert str(location(model_family="z_image", model_flavour="turbo")).startswith("ostris/zimage_turbo_training_adapter/")
    assert location(**schnell, assistant_lora_path="mine.safetensors") == "mine.safetensors"
    for otherwise in ({"disable_assistant_lora": True}, {"model_type": "full"}, {"pretrained_transformer_model_name_or_path": "another/one"}):
        assert location(**schnell, **otherwise) is None
    assert location(model_family="flux", model_flavour="dev") is None


def test_one_that_cannot_be_had_says_how_to_go_on(tmp_path, schnell, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = config_of(**of(schnell, model_flavour="schnell"))

    with pytest.raises(SimpleTunerError, match="schnell-training-adapter cannot be used") as caught:
        find_assistant(config, build_family(config))

    assert "assistant_lora_path" in str(caught.value.hint) and "disable_assistant_lora" in str(caught.value.hint)
    assert not find_assistant(config, build_family(config), trains=False).identity  # pictures go without it


def test_a_folder_of_peft_is_one_as_well(tmp_path, schnell, helper):
    plain = config_of(**of(schnell, assistant_lora_path=str(helper)))
    shutil.copy(helper / "pytorch_lora_weights.safetensors", tmp_path / "adapter_model.safetensors")
    config = config_of(**of(schnell, assistant_lora_path=str(tmp_path)))

    assert find_assistant(config, build_family(config)).identity == find_assistant(plain, build_family(plain)).identity != ""


def test_all_ranks_of_a_t_lora_are_used_and_that_is_said(tmp_path, schnell, helper):
    write_finished(tmp_path / "masked", {"algo": "tlora", "linear_dim": 4, "apply_preset": PRESET}, **of(schnell))
    notes = [
        find_assistant(config, build_family(config)).notes
        for config in (config_of(**of(schnell, assistant_lora_path=str(place))) for place in (tmp_path / "masked", helper))
    ]

    assert [len(said) for said in notes] == [1, 0] and "masked was trained with T-LoRA" in notes[0][0]


def test_one_for_another_model_is_refused(tmp_path, schnell, helper):
    shutil.copy(helper / "pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((tmp_path / "mine.safetensors").read_bytes()[:100])
    for place, said in ((torn, "not a readable"), (tmp_path / "none.safetensors", "no adapter at")):
        config = config_of(**of(schnell, assistant_lora_path=str(place)))
        with pytest.raises(ConfigError, match=said):
            find_assistant(config, build_family(config))


def test_all_weights_are_trained_without_it():
    with pytest.raises(ConfigError, match="assistant_lora_path needs model_type lora"):
        config_of(model_family="flux", model_type="full", assistant_lora_path="mine.safetensors")
    config = config_of(model_family="flux", model_flavour="schnell", model_type="full")

    assert any("cannot stand beside weights that are all trained" in note for note in assistant_notes(config, build_family(config)))


def test_a_strength_without_one_is_said():
    config = config_of(model_family="flux", model_flavour="dev", assistant_lora_strength=0.5)

    assert any("assistant_lora_strength without effect" in note for note in assistant_notes(config, build_family(config)))
