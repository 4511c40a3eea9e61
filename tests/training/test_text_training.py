"""LoRA on text encoders: trained as the scripts of diffusers train it, resumed exactly, and in every file that other software reads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from simpletuner.cli.main import main
from simpletuner.console import Console
from simpletuner.data.embeds import NoEmbeds
from simpletuner.diffusion.loss import loss_function
from simpletuner.errors import ConfigError
from simpletuner.models import usual
from simpletuner.options.memory import Memory
from simpletuner.training.building import build_adapter
from simpletuner.training.caching import TextEncoders
from simpletuner.training.export import check, export
from simpletuner.training.finished import open_finished
from simpletuner.training.live_text import live_text
from simpletuner.training.probe import text_probe
from simpletuner.training.step import Step
from simpletuner.types import Batch, Crop, Geometry, Sample, Size
from tests.builders.finished import config_of, write_finished
from tests.builders.run import adapter_bytes, train_in_process, write_run
from tests.training.families import TINY, family, model, options_of, pipeline_of

CPU = torch.device("cpu")
FAMILIES = ("sd1x", "sdxl", "sd3", "flux")
OWN = {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4, "train_text_encoder": True, "text_encoder_lr": 2e-3}
CAPTIONS = ["a cat", "a dog on a hill", ""]
PICTURE = {"validation_prompt": "a picture", "validation_num_inference_steps": 2, "validation_resolution": "32", "validation_seed": 11}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def config_for(name: str, **options: Any) -> Any:
    length = {"tokenizer_max_length": TINY[name].tokenizer_max_length} if TINY[name].tokenizer_max_length else {}
    model_options = {"model_family": name, "pretrained_model_name_or_path": str(model(name)), "mixed_precision": "no", **length}
    return config_of(**model_options, lora_rank=4, train_text_encoder=True, **options)


def batch_of(captions: list[str]) -> Batch:
    geometry = Geometry(Size(100, 80), Size(40, 32), Crop(5, 0, 32, 32))
    samples = tuple(Sample("pictures", f"{number}.png", "00", geometry, (caption,)) for number, caption in enumerate(captions))
    latents = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(samples, tuple(captions), {"mean": latents, "std": torch.zeros_like(latents)}, {})


def step_of(name: str, config: Any) -> Step:
    """A step with all that is trained moved away from its start."""
    built = family(name)
    adapter, denoiser = build_adapter(config, built), built.load_denoiser(torch.float32, 0)
    text = live_text(config, built, adapter, TextEncoders(built, config.memory, CPU, Path("unused")), NoEmbeds().read)
    adapter.attach(denoiser)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    process = built.process(config.diffusion)
    loss = loss_function("l2", 0.1)
    return Step(built, denoiser.train(), adapter, process, loss, CPU, seed=5, rank=0, draws_latents=False, encode=text.encode)


def with_lora(network: torch.nn.Module, targets: list[str], prefix: str, values: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """A network with PEFT's LoRA on it as the scripts put it there, with these values; and its parameters by our names."""
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    inside = "text_model." if any(name.startswith("text_model.") for name, _ in network.named_parameters()) else ""
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            own = prefix + name.removeprefix(inside).replace(".default", "")
            parameter.data.copy_(values[own])
            found[own] = parameter
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["sd1x", "sdxl"])
def test_loss_and_gradients_equal_those_of_the_training_scripts_of_diffusers(name, checkpointing):
    step, batch = step_of(name, config_for(name, gradient_checkpointing=checkpointing)), batch_of(CAPTIONS)
    ours = step.losses(batch, 3, 0).mean()
    ours.backward()
    noised = step.noise(batch, 3, 0)

    values = step.adapter.tensors()
    pipeline = pipeline_of(name)
    attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
    theirs = with_lora(pipeline.unet, ["to_k", "to_q", "to_v", "to_out.0"], "", values)
    encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
    if name == "sdxl":
        encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    states = []
    for number, (tokenizer, encoder) in enumerate(encoders):
        theirs |= with_lora(encoder, attention, f"text_encoder{'_2' if number else ''}.text_model.", values)
        ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True, return_dict=False)
        states.append(output[-1][-2] if name == "sdxl" else output[0])
        pooled = output[0]
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    steps = step.family.timesteps(noised.time)
    latents = step.family.scale_latents(batch.latents["mean"])
    noisy = scheduler.add_noise(latents, noised.target, steps)
    added = {"time_ids": torch.tensor([[80.0, 100, 0, 5, 32, 32]] * 3), "text_embeds": pooled} if name == "sdxl" else None
    answer = pipeline.unet(noisy, steps, torch.cat(states, -1), added_cond_kwargs=added).sample
    loss = torch.nn.functional.mse_loss(answer, noised.target)
    loss.backward()

    assert abs(ours.item() - loss.item()) < 1e-6 * loss.item()
    mine = step.adapter.parameters()
    assert mine.keys() == theirs.keys()
    assert {key for key in mine if mine[key].grad is None} == {key for key in theirs if theirs[key].grad is None}  # layers behind what is read
    learning = [key for key in mine if mine[key].grad is not None]
    assert sum(key.startswith("text_encoder") for key in learning) > 10
    for part in ("text_encoder.", "text_encoder_2.", ""):
        keys = [key for key in learning if (key.startswith(part) if part else not key.startswith("text_encoder"))]
        if keys:
            own, other = (torch.cat([parameters[key].grad.flatten() for key in keys]) for parameters in (mine, theirs))
            assert (own - other).norm() < 1e-6 * other.norm(), part


@pytest.mark.parametrize("dtype", ["no", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_before_the_first_step_captions_become_what_the_cache_would_hold_bit_for_bit(name, dtype):
    config = config_for(name, lora_init_type="gaussian").model_copy(update={"memory": Memory(mixed_precision=dtype)})
    built = family(name)
    cached = TextEncoders(built, config.memory, CPU, Path("unused"))

    frozen = TextEncoders(built, config.memory, CPU, Path("unused"), built.frozen_text)
    trained = TextEncoders(built, config.memory, CPU, Path("unused"), [name.split(".")[0] for name in built.adaptable_text])
    alone = {caption: {key: value[0] for key, value in frozen.encode([caption]).items()} if built.frozen_text else {} for caption in CAPTIONS}
    text = live_text(config, built, build_adapter(config, built), trained, alone.__getitem__)

    live = text.encode(CAPTIONS, {key: torch.stack([alone[caption][key] for caption in CAPTIONS]) for key in alone[""]})
    together = cached.encode(CAPTIONS)  # a projection of one pooled row alone is another sum than that of several
    assert live.keys() == together.keys() and all(torch.equal(live[key], value) for key, value in together.items())
    for caption in CAPTIONS:
        whole = cached.encode([caption])
        assert all(torch.equal(value, whole[key][0]) for key, value in text.read(caption).items())
    assert any(tensor.requires_grad for tensor in live.values())


def test_regularisation_pictures_keep_what_the_untouched_text_encoders_say():
    step, batch = step_of("sd1x", config_for("sd1x")), batch_of(CAPTIONS)
    kept = replace(batch, samples=tuple(replace(sample, is_regularisation=True) for sample in batch.samples))
    built = family("sd1x")
    plain = built.encode_text(built.load_text_encoders(CPU, torch.float32), CAPTIONS)
    noised = step.noise(kept, 0, 0)
    expected = built.predict(built.load_denoiser(torch.float32, 0), noised, replace(batch, text=plain))

    target = step._parent_prediction(noised, kept)

    assert torch.allclose(target, expected, atol=1e-6)
    assert (step.predict(noised, batch) - expected).abs().max() > 1e-3


def test_a_run_resumes_exactly_and_lets_the_text_encoders_be_after_their_share(tmp_path):
    options = {**options_of("sdxl"), **OWN, "lora_dropout": 0.2, "use_ema": True, "text_encoder_limit": 50, "gradient_checkpointing": True}
    varied = {"caption_dropout_probability": 0.3, **PICTURE, "validation_step_interval": 6}
    write_run(tmp_path / "whole", **options, **varied)
    assert train_in_process(tmp_path / "whole") == 0
    output = tmp_path / "whole" / "output"
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "output" / "checkpoint-6")
    (tmp_path / "resumed" / "output" / "pytorch_lora_weights.safetensors").unlink()

    assert train_in_process(tmp_path / "resumed") == 0

    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")
    assert not (tmp_path / "whole" / "cache" / "text").exists()
    half, end = (load_file(output / f"checkpoint-{number}" / "pytorch_lora_weights.safetensors") for number in (3, 6))
    moved = {key for key in half if not torch.equal(half[key], end[key])}
    assert moved and not any(key.startswith("text_encoder") for key in moved)
    assert half["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"].any()
    pictures = {
        folder: (tmp_path / folder / "output" / "validation_images" / "step_00006_validation_11_32x32.png") for folder in ("whole", "resumed")
    }
    assert pictures["whole"].read_bytes() == pictures["resumed"].read_bytes()


@pytest.mark.parametrize("name", [pytest.param("flux", marks=pytest.mark.slow), "sd3"])
def test_a_t5_beside_trained_encoders_reads_each_caption_once_and_is_gone_while_they_train(tmp_path, monkeypatch, capfd, name):
    options = {**options_of(name), **OWN, **PICTURE, "max_train_steps": 2, "validation_step_interval": 2, "caption_dropout_probability": 0.3}
    kind = type(family(name))
    loads, load = [], usual.load_text_encoder
    monkeypatch.setattr(
        usual,
        "load_text_encoder",
        lambda source, device, dtype, folder, *others: loads.append(folder) or load(source, device, dtype, folder, *others),
    )
    t5, clips = kind.text_parts[-1][0], [folder for folder, _ in kind.text_parts[:-1]]
    with monkeypatch.context() as patch:  # all of them at every step
        patch.setattr(kind, "frozen_text", ())
        trained = kind.encode_trained
        patch.setattr(
            kind, "encode_trained", lambda self, some, prompts, frozen: trained(self, some, prompts, kind.encode_frozen(self, some, prompts))
        )
        write_run(tmp_path / "live", **options)
        assert train_in_process(tmp_path / "live") == 0
    assert loads == [*clips, t5] and not (tmp_path / "live" / "cache" / "text").exists()

    write_run(tmp_path / "kept", **options)
    assert train_in_process(tmp_path / "kept") == 0

    assert loads[len(clips) + 1 :] == [t5, *clips]
    assert adapter_bytes(tmp_path / "kept") == adapter_bytes(tmp_path / "live")
    shown = [tmp_path / run / "output/validation_images/step_00002_validation_11_32x32.png" for run in ("live", "kept")]
    assert shown[0].read_bytes() == shown[1].read_bytes()
    assert f"what {t5} makes of them is cached" in capfd.readouterr().out
    loads.clear()
    assert train_in_process(tmp_path / "kept", "--max_train_steps", "3") == 0
    assert loads == clips  # the T5 is not even read again


def test_validation_generate_and_the_plain_pipeline_make_the_same_picture(tmp_path, monkeypatch, capfd):
    write_run(
        tmp_path, **options_of("sdxl"), **{**OWN, "text_encoder_lr": 0.05}, **PICTURE, validation_step_interval=6, caption_dropout_probability=0
    )
    assert train_in_process(tmp_path) == 0
    assert "no text cache is made" in capfd.readouterr().out
    shown = Image.open(tmp_path / "output/validation_images/step_00006_validation_11_32x32.png")
    base = Image.open(tmp_path / "output/validation_images/base_validation_11_32x32.png")

    pipeline = pipeline_of("sdxl", tmp_path / "model")
    pipeline.load_lora_weights(str(tmp_path / "output"))
    arguments = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(11)}
    plain = pipeline("a picture", negative_prompt="blurry, cropped, ugly", **arguments).images[0]
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a picture", "--adapter", "output", "--output", "made", "--strength", "0,1"]) == 0

    def differ(one: Image.Image, other: Image.Image) -> int:
        return int(numpy.abs(numpy.asarray(one).astype(int) - numpy.asarray(other).astype(int)).max())

    assert differ(shown, plain) <= 1 < differ(shown, base)
    none, full = (Image.open(next(Path("made").glob(f"*_strength_{strength}.png"))) for strength in (0, 1))
    assert differ(none, base) <= 1 and differ(full, shown) <= 1


class Silent(Console):
    def say(self, text: str = "", style: str | None = None) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "layouts", "options"),
    [
        ("sdxl", ("diffusers", "kohya", "comfyui"), {}),
        ("sd1x", ("diffusers", "kohya"), {"use_dora": True}),  # of the denoiser
        ("sd3", ("diffusers",), {}),
        ("flux", ("diffusers", "comfyui"), {}),
    ],
    ids=["sdxl", "sd1x", "sd3", "flux"],
)
def test_every_format_holds_what_the_text_encoders_learned(tmp_path, name, layouts, options):
    length = {"tokenizer_max_length": TINY[name].tokenizer_max_length} if TINY[name].tokenizer_max_length else {}
    place = {"model_family": name, "pretrained_model_name_or_path": str(model(name)), **length}
    config = write_finished(tmp_path / "run", **place, lora_rank=4, lora_alpha=6.0, train_text_encoder=True, **options)
    finished = open_finished(tmp_path / "run", config, has_settings=True)

    for layout in layouts:
        file = tmp_path / f"{layout}.safetensors"
        export(finished, layout, file, checks=False, console=Silent())
        checked = check(finished, layout, file)
        assert checked.is_good and checked.text.effect > 20 * checked.text.difference, (layout, checked.said())
    with pytest.raises(ConfigError, match="lycoris cannot hold LoRAs of text encoders"):
        export(finished, "lycoris", tmp_path / "lycoris.safetensors", checks=False, console=Silent())

    again = open_finished(tmp_path / f"{layouts[-1]}.safetensors", config, has_settings=False)
    answers = []
    for one in (finished, again):
        encoders = one.family.load_text_encoders(CPU, torch.float32)
        one.put_on_text(encoders)
        answers.append(text_probe(one.family, encoders))
    assert (answers[0] - answers[1]).abs().max() < 1e-3 * checked.text.effect


def test_diffusers_reads_the_text_encoders_of_kohyas_layout(tmp_path):
    config = write_finished(
        tmp_path / "run", model_family="sdxl", pretrained_model_name_or_path=str(model("sdxl")), lora_rank=4, train_text_encoder=True
    )
    finished = open_finished(tmp_path / "run", config, has_settings=True)
    export(finished, "kohya", tmp_path / "lora.safetensors", checks=False, console=Silent())
    names = {key.split("_text_model")[0] for key in load_file(tmp_path / "lora.safetensors") if "_te" in key}
    pipeline = pipeline_of("sdxl")
    before = torch.cat([tensor.flatten() for tensor in pipeline.encode_prompt("a cat", do_classifier_free_guidance=False) if tensor is not None])

    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")

    after = torch.cat([tensor.flatten() for tensor in pipeline.encode_prompt("a cat", do_classifier_free_guidance=False) if tensor is not None])
    encoders = finished.family.load_text_encoders(CPU, torch.float32)
    finished.put_on_text(encoders)
    ours = torch.cat([tensor.flatten() for tensor in finished.family.encode_text(encoders, ["a cat"]).values()])
    assert names == {"lora_te1", "lora_te2"}
    assert (after - ours).abs().max() < 1e-3 * (after - before).abs().max()


def test_a_merged_pipeline_has_what_the_text_encoders_learned(tmp_path, capfd):
    config = write_finished(
        tmp_path / "run", model_family="sdxl", pretrained_model_name_or_path=str(model("sdxl")), lora_rank=4, train_text_encoder=True
    )
    finished = open_finished(tmp_path / "run", config, has_settings=True)

    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0

    assert "one prompt differs by" in capfd.readouterr().out
    merged = pipeline_of("sdxl", tmp_path / "merged")
    states = merged.encode_prompt("a cat", do_classifier_free_guidance=False)
    encoders = finished.family.load_text_encoders(CPU, torch.float32)
    finished.put_on_text(encoders)
    ours = finished.family.encode_text(encoders, ["a cat"])
    assert torch.allclose(states[0], ours["prompt"], atol=1e-5) and torch.allclose(states[2], ours["pooled"], atol=1e-5)


def test_a_run_goes_on_from_a_file_of_kohya(tmp_path):
    config = write_finished(
        tmp_path / "theirs", model_family="sd1x", pretrained_model_name_or_path=str(model("sd1x")), lora_rank=4, train_text_encoder=True
    )
    finished = open_finished(tmp_path / "theirs", config, has_settings=True)
    export(finished, "kohya", tmp_path / "file.safetensors", checks=False, console=Silent())
    step = step_of("sd1x", config_for("sd1x"))

    step.adapter.load(tmp_path / "file.safetensors")

    start = load_file(tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    found = step.adapter.tensors()
    assert all(torch.equal(value, start[key if key.startswith("text_encoder") else f"unet.{key}"]) for key, value in found.items())
    assert any(key.startswith("text_encoder.") for key in found) and len(found) == len(start)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_family": "auraflow"}, ["auraflow", "flux, sd1x, sd2x, sd3, sdxl"]),
        ({**OWN, "model_family": "sdxl", "lora_type": "lycoris"}, ["lora_type", "standard"]),
        ({"model_family": "sdxl", "model_type": "full", "lora_type": None}, ["model_type", "lora"]),
        ({"model_family": "sdxl", "text_encoder_2_precision": "int8-quanto"}, ["text_encoder_2_precision", "no_change"]),
    ],
    ids=["a family without", "lycoris", "all weights", "quantised"],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path, capfd, options, said):
    name = options["model_family"]
    write_run(tmp_path, **{**options_of(name), **OWN, **options})

    for arguments in ((), ("--dry-run",)):
        assert train_in_process(tmp_path, *arguments) == 2
        told = capfd.readouterr().err
        assert "train_text_encoder" in told and all(word in told for word in said), told


def test_a_dry_run_says_that_captions_are_not_cached(tmp_path, capfd):
    write_run(tmp_path, **options_of("sdxl"), **OWN)

    assert train_in_process(tmp_path, "--dry-run", "--text_encoder_batch_size", "8") == 0

    told = capfd.readouterr().out
    assert "text_encoder_batch_size has no effect" in " ".join(told.split())
    assert "no text cache is made" in told and "text embeddings in" not in told and "on text encoders too" in told
