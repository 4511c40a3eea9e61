"""What every family promises: text and pictures as its own pipeline makes them, exact resume, adapters that diffusers loads."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lycoris import create_lycoris_from_weights
from PIL import Image

from simpletuner import plugins
from simpletuner.types import Batch, Crop, Geometry, Noised, Sample
from tests.builders.run import adapter_bytes, train_in_process, write_run
from tests.training.families import TINY, cells, family, model, options_of, pipeline_of, steps_of

CPU = torch.device("cpu")
LOOKING = {
    "validation_prompt": "a cat",
    "validation_negative_prompt": "blurry",
    "validation_num_inference_steps": 2,
    "validation_seed": 11,
}
ALIKE = {"sd2x": "sd1x"}
"""Families that differ from another by their flavours alone."""
FAMILIES = [name for name, tiny in TINY.items() if tiny.family is None and not tiny.is_brief]
"""Without further models of the same family, and families like another, which need not be held to all again."""
KINDS = {
    "lokr": {},
    "lora": {"lora_type": "standard", "lycoris_config": None},
    "all weights": {"model_type": "full", "lora_type": None, "lycoris_config": None},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(params=TINY)
def name(request) -> str:
    return request.param


def looking(name: str) -> dict[str, Any]:
    return {**LOOKING, "validation_resolution": str(TINY[name].size)}


def render(name: str, pipeline: Any) -> numpy.ndarray:
    text, size = family(name).pipeline_text_arguments(), TINY[name].size
    image = pipeline(
        **TINY[name].prompts(pipeline, **text),
        width=size.width,
        height=size.height,
        **{**steps_of(name, 2), "num_inference_steps": 2},
        **family(name).pipeline_call_arguments(family(name).defaults.get("validation_guidance", 3.5)),
        generator=torch.Generator().manual_seed(11),
        **text,
    ).images[0]
    return numpy.asarray(image).astype(int)


def shown(folder: Path, label: str) -> numpy.ndarray:
    (file,) = (folder / "output" / "validation_images").glob(f"{label}_validation_11_*.png")
    return numpy.asarray(Image.open(file)).astype(int)


def start_of(name: str, count: int = 1) -> torch.Tensor:
    size, stride = TINY[name].size, family(name).vae_stride
    return torch.randn(count, 4, size.height // stride, size.width // stride, generator=torch.Generator().manual_seed(0))


def batch_of(name: str, captions: tuple[str, ...], text: dict[str, torch.Tensor]) -> Batch:
    size = TINY[name].size
    geometry = Geometry(size, size, Crop(0, 0, size.width, size.height))
    return Batch((Sample("pictures", "a.png", "00", geometry, ("a cat",)),) * len(captions), captions, {}, text)


def test_every_family_is_held_to_this():
    assert {ALIKE.get(found, found) for found in plugins.names("simpletuner.models.families")} == {tiny.family or name for name, tiny in TINY.items()}


def test_the_names_of_adapters_targets_are_in_the_denoiser(name):
    built = family(name)
    modules = dict(built.load_denoiser(torch.float32, 0).named_modules())

    classes = {type(module).__name__ for module in modules.values()}
    assert {short for short, names in built.class_aliases.items() if not classes.intersection(names)} == set()
    assert {suffix for suffix in built.lora_targets if not any(path.endswith(f".{suffix}") for path in modules)} == set()


@torch.no_grad()
def test_text_is_encoded_as_the_pipeline_does_it(name):
    captions = ["a cat", "", "a long caption " * 9]
    built = family(name)
    pipeline, as_the_pipeline = pipeline_of(name), TINY[name].text
    if as_the_pipeline is not None:
        theirs = as_the_pipeline(pipeline, captions, **built.pipeline_text_arguments())
        ours = built.encode_text(built.load_text_encoders(CPU, torch.float32), captions)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        return
    arguments = {"sd3": {"prompt_2": captions, "prompt_3": captions}}.get(name, {"num_images_per_prompt": 1})
    if "do_classifier_free_guidance" in inspect.signature(pipeline.encode_prompt).parameters:
        arguments["do_classifier_free_guidance"] = False
    ours = built.encode_text(built.load_text_encoders(CPU, torch.float32), captions)

    theirs = pipeline.encode_prompt(captions, device="cpu", **arguments, **built.pipeline_text_arguments())

    assert torch.equal(ours["prompt"], theirs[0])
    if "pooled" in ours:
        assert torch.equal(ours["pooled"], theirs[{"sdxl": 2, "sd3": 2, "flux": 1}[name]])
    if name == "chroma":
        assert torch.equal(ours["mask"], theirs[2])


@torch.no_grad()
def test_training_calls_the_denoiser_as_a_sampling_step_of_the_pipeline_does(name):
    built, pipeline = family(name), pipeline_of(name)
    encoded = built.encode_text(built.load_text_encoders(CPU, torch.float32), ["a cat"])
    denoiser = getattr(pipeline, built.denoiser_folder)
    calls = []
    denoiser.register_forward_hook(lambda module, args, kwargs, output: calls.append((args, kwargs, torch.cat(list(output[0])))), with_kwargs=True)
    start = start_of(name)
    tiny, text = TINY[name], built.pipeline_text_arguments()
    guidance = built.pipeline_call_arguments(tiny.unguided)
    size = {"width": tiny.size.width, "height": tiny.size.height, **guidance, **steps_of(name, 1)}
    pipeline(**tiny.prompts(pipeline, **text), **size, output_type="latent", latents=tiny.packed(start) if tiny.packed else start, **text)
    args, kwargs, sampled = calls[0]
    seen = kwargs.get("hidden_states", args[0] if args else None)
    told = kwargs.get("timestep", args[1] if len(args) > 1 else None).float().reshape(-1)[:1]
    noised = Noised(start if tiny.packed else seen, start, tiny.time(told), guidance=torch.ones(1))

    answer = built.predict(denoiser, noised, batch_of(name, ("a cat",), encoded))

    assert torch.equal(calls[-1][2], sampled) and len(calls) > 1
    assert answer.shape == start.shape


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].packed is not cells])  # the others give tokens out; test_flux2 has them
def test_latents_are_scaled_as_the_pipeline_undoes_it(name):
    built, pipeline, tiny = family(name), pipeline_of(name), TINY[name]
    text, decode, raw = built.pipeline_text_arguments(), pipeline.vae.decode, []
    call = {"width": tiny.size.width, "height": tiny.size.height, **steps_of(name, 1), **built.pipeline_call_arguments(tiny.unguided), **text}
    pipeline.vae.decode = lambda latents, **options: raw.append(latents) or decode(latents, **options)

    scaled, _ = (
        pipeline(**tiny.prompts(pipeline, **text), **call, output_type=kind, generator=torch.Generator().manual_seed(0)).images
        for kind in ("latent", "np")
    )

    ours = built.scale_latents(raw[0].reshape(start_of(name).shape))
    assert torch.allclose((tiny.packed(ours) if tiny.packed else ours).flatten(), scaled.flatten(), atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(name):
    built = family(name)
    text = built.encode_text(built.load_text_encoders(CPU, torch.float32), ["a cat", "a longer prompt"])
    denoiser = built.load_denoiser(torch.float32, 0).train().requires_grad_(True)
    start, batch = start_of(name, 2), batch_of(name, ("a cat", "a longer prompt"), text)
    noised = Noised(start, start, torch.tensor([0.3, 0.8]), guidance=torch.ones(2))

    def gradients() -> list[torch.Tensor]:
        denoiser.zero_grad()
        built.predict(denoiser, noised, batch).square().mean().backward()
        return [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]

    plain = gradients()
    denoiser.enable_gradient_checkpointing()
    checkpointed = gradients()

    assert len(plain) == len(checkpointed) > 0
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(plain, checkpointed))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in TINY for kind in KINDS if name in FAMILIES or kind == "lokr"])
def test_a_resumed_run_gives_the_same_bytes(tmp_path, name, kind):
    write_run(tmp_path / "whole", **options_of(name), **KINDS[kind])
    assert train_in_process(tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    assert train_in_process(tmp_path / "resumed") == 0

    def result(folder: Path) -> bytes:
        weights = folder / "output" / "pipeline" / family(name).denoiser_folder / "diffusion_pytorch_model.safetensors"
        return weights.read_bytes() if kind == "all weights" else adapter_bytes(folder)

    assert result(tmp_path / "whole") == result(tmp_path / "resumed")


def test_validation_shows_what_diffusers_and_lycoris_render_without_us(tmp_path, name):
    write_run(tmp_path, **options_of(name), **looking(name), learning_rate=0.05)
    assert train_in_process(tmp_path) == 0
    pipeline = pipeline_of(name)
    base = render(name, pipeline)

    denoiser = getattr(pipeline, family(name).denoiser_folder)
    network, weights = create_lycoris_from_weights(1.0, str(tmp_path / "output" / "pytorch_lora_weights.safetensors"), denoiser)
    for module in network.loras:
        module.bypass_mode = True
    network.apply_to()
    adapted = render(name, pipeline)

    assert {key.split(".")[0] for key in weights} == {module.lora_name for module in network.loras}  # nothing missing, nothing unused
    # The prompt was encoded in a batch with others, which rounds otherwise in the last bit.
    assert numpy.abs(shown(tmp_path, "base") - base).max() <= 1
    assert numpy.abs(shown(tmp_path, "step_00006") - adapted).max() <= 1
    assert numpy.abs(adapted - base).max() > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_rendered_when_every_part_has_another_precision(tmp_path, name):
    """Weights that are trained are float32, text and VAE are not."""
    write_run(
        tmp_path,
        **{**options_of(name), **looking(name), **KINDS["all weights"], "mixed_precision": "bf16", "vae_dtype": "bf16", "max_train_steps": 1},
    )

    assert train_in_process(tmp_path) == 0

    assert shown(tmp_path, "step_00001").std() > 0


@pytest.mark.parametrize(
    ("family_name", "key", "value"),
    [("flux", "validation_negative_prompt", "blurry"), ("sd3", "distilled_guidance", 3.5), ("sdxl", "distilled_guidance", 3.5)],
)
def test_what_a_family_does_not_use_is_said(tmp_path, capfd, family_name, key, value):
    write_run(tmp_path, **options_of(family_name), **{**looking(family_name), key: value})

    assert train_in_process(tmp_path, "--dry-run") == 0

    said = [line for line in capfd.readouterr().out.splitlines() if "no effect" in line]
    assert any(key in line for line in said), said


def test_a_plain_lora_loads_in_diffusers(tmp_path, name, capfd, monkeypatch):
    write_run(tmp_path, **options_of(name), **looking(name), **KINDS["lora"])
    assert train_in_process(tmp_path) == 0
    if family(name).pipeline_loads_lora:
        pipeline = pipeline_of(name)
        pipeline.load_lora_weights(tmp_path / "output")
        rendered = render(name, pipeline)
    else:  # the lines that the run ends with do it
        monkeypatch.chdir(tmp_path)
        exec(capfd.readouterr().out.partition("Use it with diffusers:")[2], {})
        rendered = numpy.asarray(Image.open("picture.png")).astype(int)

    assert numpy.abs(shown(tmp_path, "step_00006") - rendered).max() <= 1


def test_a_fully_trained_model_is_a_whole_pipeline(tmp_path, name):
    write_run(tmp_path, **options_of(name), **looking(name), **KINDS["all weights"])
    assert train_in_process(tmp_path) == 0

    pipeline = pipeline_of(name, tmp_path / "output" / "pipeline")

    assert numpy.abs(shown(tmp_path, "step_00006") - render(name, pipeline)).max() <= 1
    assert model(name).is_dir()
