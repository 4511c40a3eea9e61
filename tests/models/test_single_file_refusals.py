"""What a single file does not say, or says otherwise than the options do: refused, or said, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.cli.choices import family_of
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from tests.builders import single_file
from tests.builders.flux import build_tiny_flux
from tests.builders.flux2 import build_tiny_flux2
from tests.builders.stable_diffusion import build_tiny_sd1, build_tiny_sdxl

CPU = torch.device("cpu")
NO_HUB = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd1(tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux2(tmp_path_factory.mktemp("models") / "flux2")


def build(name: str, location: Path, **options: object) -> ModelFamily:
    told = {key: str(value) for key, value in options.items()}
    return family_of(name)(Models(model_family=name, pretrained_model_name_or_path=str(location), **told))


def header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of tensors of these shapes, a byte a number."""
    save_file({name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes.items()}, path)
    return path


# What a model predicts.


@pytest.mark.parametrize(
    ("metadata", "marks", "stated"),
    [
        ({"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, [], "epsilon"),
        ({"modelspec.predict_key": "epsilon"}, [], "epsilon"),
        ({"ss_v_parameterization": "True"}, [], "v_prediction"),
        ({"ss_v_parameterization": "False", "ss_v2": "True"}, [], "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, [], "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, [], "v_prediction"),
        ({}, ["v_pred"], "v_prediction"),
        ({"ss_v2": "True", "modelspec.architecture": "stable-diffusion-v2"}, [], None),
        ({}, [], None),
    ],
)
def test_a_stable_diffusion_2_file_is_trained_by_what_it_says_of_itself_or_not_at_all(tmp_path, base, monkeypatch, metadata, marks, stated):
    monkeypatch.setenv("HF_ENDPOINT", NO_HUB)
    path = single_file.write_sd2(base, tmp_path / "m.safetensors", metadata=metadata, **{mark: torch.tensor([]) for mark in marks})
    family = build("sd2x", path)

    if stated is not None:
        assert family.source.part("scheduler").changes == {"prediction_type": stated}
        assert family.objective_notes(Diffusion()) == [] and any(stated in note for note in family.notes())
        return
    for options in ({}, {"model_flavour": "2.1"}):  # a flavour says whose settings are taken, not of which model the file was made
        with pytest.raises(ConfigError, match=f"{path} does not say what it predicts") as caught:
            build("sd2x", path, **options).objective_notes(Diffusion())
        assert "prediction_type to epsilon" in caught.value.hint and "to v_prediction" in caught.value.hint


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_option_or_a_base_that_was_named_says_what_a_silent_file_predicts(tmp_path, base, prediction):
    path = single_file.write_sd2(base, tmp_path / "m.safetensors")
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    settings = json.loads((mine / "scheduler" / "scheduler_config.json").read_text())
    (mine / "scheduler" / "scheduler_config.json").write_text(json.dumps({**settings, "prediction_type": prediction}))

    by_base, by_option = build("sd2x", path, single_file_base_model=mine), build("sd2x", path, single_file_base_model=base)

    assert by_base.process(Diffusion()).prediction == by_option.process(Diffusion(prediction_type=prediction)).prediction == prediction
    assert by_base.objective_notes(Diffusion()) == [f'{path} does not say what it predicts: prediction_type "{prediction}" is that of {mine}']


def test_a_u_net_alone_in_a_file_needs_a_model_that_was_named_or_the_option(tmp_path, base):
    path = single_file.write_sd2(base, tmp_path / "m.safetensors")

    with pytest.raises(ConfigError, match="does not say what it predicts"):
        family_of("sd2x")(Models(model_family="sd2x", pretrained_unet_model_name_or_path=str(path))).objective_notes(Diffusion())

    assert build("sd2x", base, pretrained_unet_model_name_or_path=path).process(Diffusion()).prediction == "epsilon"


# Flavours.

SD3 = {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (8,)}
FLAVOURS = {
    "flux2 klein-9b": ({"single_stream_modulation.lin.weight": (3 * 3072, 1)}, "klein-4b or klein-4b-distilled"),
    "flux2 dev": ({"single_stream_modulation.lin.weight": (3 * 4096, 1)}, "klein-9b or klein-9b-distilled"),
    "sd3 medium": ({**SD3, "joint_blocks.37.x_block.mlp.fc1.weight": (8, 8)}, "large"),
    "sd3 large": ({**SD3, "pos_embed": (1, 384**2, 1)}, "medium"),
    "flux schnell": (
        {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "guidance_in.in_layer.weight": (8, 8)},
        "dev or krea or fluxbooru",
    ),
    "flux dev": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "schnell or libreflux or fluxbooru"),
}


@pytest.mark.parametrize("asked", FLAVOURS)
def test_a_flavour_that_a_file_is_not_of_is_refused_with_the_one_that_fits(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("HF_ENDPOINT", NO_HUB)
    shapes, fitting = FLAVOURS[asked]
    path, (name, flavour) = header(tmp_path / "m.safetensors", shapes), asked.split()
    alone = {"model_family": name, "pretrained_transformer_model_name_or_path": str(path), "model_flavour": flavour}

    for family in (build(name, path, model_flavour=flavour), family_of(name)(Models(**alone))):
        with pytest.raises(ConfigError, match=f"{path} is .* transformer of flavour {fitting}, and model_flavour is {flavour}") as caught:
            family.check_source()
        assert caught.value.hint == f"Set model_flavour to {fitting}."

    build(name, path, model_flavour=fitting.split()[0]).check_source()
    build(name, path).check_source()


def test_a_transformer_that_would_go_into_a_model_of_another_flavour_is_refused(tmp_path):
    path = header(tmp_path / "m.safetensors", FLAVOURS["flux2 klein-9b"][0])

    with pytest.raises(ConfigError, match="klein-base-9B, the model that it would go into, is klein-9b"):
        family_of("flux2")(Models(model_family="flux2", pretrained_transformer_model_name_or_path=str(path))).check_source()


def test_flux_2_asks_no_hub_which_options_are_idle_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("simpletuner.models.source.fetch_file", lambda *arguments: pytest.fail(f"asked the hub for {arguments}"))
    klein = header(tmp_path / "klein.safetensors", {"single_stream_modulation.lin.weight": (3 * 3072, 1)})
    dev = header(tmp_path / "dev.safetensors", {"single_stream_modulation.lin.weight": (3 * 6144, 1)})
    (tmp_path / "damaged.safetensors").write_bytes(b"no")

    assert list(build("flux2", klein).idle) == ["distilled_guidance"]
    assert list(build("flux2", dev).idle) == ["validation_negative_prompt"]
    assert build("flux2", klein, single_file_base_model="someone/else").idle == {}
    assert build("flux2", tmp_path / "damaged.safetensors").idle == {}
    absent = build("flux2", "https://huggingface.co/a/b/blob/main/m.safetensors")
    assert absent.idle == {}
    absent.check_source()


# Tensors that nothing has a place for, and places that nothing fills.


def test_tensors_of_a_deeper_network_are_refused_and_what_a_training_leaves_is_not(tmp_path, sdxl):
    path = single_file.write_sdxl(sdxl, tmp_path / "m.safetensors")
    tensors, start = load_file(path), "model.diffusion_model."
    left = {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(9), "optimizer.state.0": torch.ones(4), f"{start}mark": torch.ones(1)}
    deeper = {f"{start}input_blocks.2.1.transformer_blocks.7.norm1.weight": torch.ones(8), f"{start}input_blocks.9.0.op.bias": torch.ones(8)}
    save_file({**tensors, **left}, tmp_path / "left.safetensors")
    save_file({**tensors, **deeper}, tmp_path / "deeper.safetensors")
    family = build("sdxl", tmp_path / "left.safetensors", single_file_base_model=sdxl)

    family.load_denoiser(torch.float32, 0)

    assert not any("left out" in note for note in family.notes())
    with pytest.raises(ConfigError, match=r"no place for 2 of its tensors, such as model\.diffusion_model\.input_blocks\.") as caught:
        build("sdxl", tmp_path / "deeper.safetensors", single_file_base_model=sdxl).load_denoiser(torch.float32, 0)
    assert "single_file_base_model" in caught.value.hint


def test_a_transformer_with_the_names_of_diffusers_is_held_to_them(tmp_path):
    folder = build_tiny_flux(tmp_path / "flux")
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    first = sorted(tensors)[0]
    save_file({**tensors, "step": torch.ones(1)}, tmp_path / "marked.safetensors")
    save_file({**tensors, "single_transformer_blocks.9.norm.linear.bias": torch.ones(8)}, tmp_path / "deeper.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, tmp_path / "gap.safetensors")

    def load(name: str) -> torch.nn.Module:
        return build("flux", tmp_path / f"{name}.safetensors", single_file_base_model=folder).load_denoiser(torch.float32, 0)

    assert all(torch.equal(value, tensors[name]) for name, value in load("marked").state_dict().items())
    with pytest.raises(ConfigError, match=r"no place for 1 of its tensors, such as single_transformer_blocks\.9"):
        load("deeper")
    with pytest.raises(ConfigError, match=f"it lacks {first}"):
        load("gap")


def test_tensors_beside_the_parts_are_counted_and_said_once(tmp_path, sdxl):
    extra = {"text_encoders.t5xxl.a": torch.ones(2), "text_encoders.t5xxl.b": torch.ones(2), "vision.a": torch.ones(2)}
    path = single_file.write_sdxl(sdxl, tmp_path / "m.safetensors", **extra)

    said = [note for note in build("sdxl", path, single_file_base_model=sdxl).notes() if "left out" in note]

    assert said == [f"3 tensors of {path} are of no part that is read from it and are left out: text_encoders (2), vision (1)"]


def test_a_vae_without_the_statistics_that_it_keeps_in_buffers_is_refused(tmp_path, flux2):
    weights = "diffusion_pytorch_model.safetensors"
    folder, whole = Path(shutil.copytree(flux2, tmp_path / "model")), load_file(flux2 / "vae" / weights)
    tensors = {name: tensor for name, tensor in whole.items() if name != "bn.running_var"}
    save_file(tensors, folder / "vae" / weights, {"format": "pt"})
    save_file(tensors, tmp_path / "gap.safetensors")
    save_file({name: tensor for name, tensor in whole.items() if "num_batches" not in name}, tmp_path / "whole.safetensors")

    with pytest.raises(ConfigError, match=r"lack 1 tensors .* such as bn\.running_var"):
        build("flux2", folder).load_vae(CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"it lacks bn\.running_var"):
        build("flux2", flux2, pretrained_vae_model_name_or_path=tmp_path / "gap.safetensors").load_vae(CPU, torch.float32)

    loaded = build("flux2", flux2, pretrained_vae_model_name_or_path=tmp_path / "whole.safetensors").load_vae(CPU, torch.float32)
    assert all(torch.equal(value, whole[name]) for name, value in loaded.state_dict().items())


def test_a_layout_that_nothing_maps_is_named(tmp_path, flux2):
    makers = ("encoder.conv_in", "decoder.conv_in", *(f"{half}.down.0.block.{block}.conv1" for half in ("encoder", "decoder") for block in (0, 1)))
    path = header(tmp_path / "ae.safetensors", {f"{name}.weight": (8, 8, 3, 3) for name in makers})

    with pytest.raises(ConfigError, match="in the layout of its makers, in which diffusers reads no AutoencoderKLFlux2") as caught:
        build("flux2", flux2, pretrained_vae_model_name_or_path=path).load_vae(CPU, torch.float32)
    assert "layout of diffusers" in caught.value.hint


# The rest.


def test_a_file_that_was_opened_for_one_part_is_held_to_the_next_as_well(tmp_path, base):
    vae = single_file.save(single_file.ldm_vae(base), tmp_path / "vae.safetensors")
    family = build("sd1x", vae, pretrained_vae_model_name_or_path=vae, single_file_base_model=base)

    assert family.source.part("vae").checkpoint is not None
    with pytest.raises(ConfigError, match="is a VAE, not a whole model"):
        family.check_source()


def test_a_file_that_is_wrong_for_two_parts_is_said_once_by_its_option(tmp_path, sdxl, base):
    wrong = single_file.write_sd1(base, tmp_path / "sd1.safetensors")

    with pytest.raises(ConfigError) as caught:
        build("sdxl", sdxl, pretrained_unet_model_name_or_path=wrong).check_source()

    said = f"pretrained_unet_model_name_or_path: {wrong} is a Stable Diffusion 1 model; model_family sdxl cannot be trained from it"
    assert caught.value.message == said


def test_what_has_no_effect_on_a_u_net_is_not_asked_of_its_schedule(tmp_path, base):
    family = build("sd1x", base, pretrained_transformer_model_name_or_path=tmp_path / "nowhere.safetensors")

    assert family.source.denoiser_checkpoint() is None
    assert any("sd1x has no transformer" in note for note in family.notes())


def test_a_folder_of_one_network_is_answered_with_the_option_of_its_own_kind(base):
    with pytest.raises(ConfigError, match="is a single UNet2DConditionModel") as caught:
        build("sd1x", base / "unet").check_source()

    assert "pretrained_unet_model_name_or_path" in caught.value.hint


def test_more_tokens_than_the_pipeline_of_qwen_image_reads_are_refused():
    with pytest.raises(ConfigError, match=r"tokenizer_max_length 1025 is too long .* reads 1024 tokens") as caught:
        family_of("qwen_image")(Models(model_family="qwen_image", tokenizer_max_length=1025)).check_source()

    assert "1024 at most" in caught.value.hint
    family_of("qwen_image")(Models(model_family="qwen_image", tokenizer_max_length=1024)).check_source()


def test_what_is_said_of_a_file_before_a_run_imports_no_torch(tmp_path, base, sdxl, flux2):
    files = {
        "sd1x": (single_file.write_sd1(base, tmp_path / "sd1.safetensors"), base),
        "sd2x": (single_file.write_sd2(base, tmp_path / "sd2.safetensors", metadata={"modelspec.predict_key": "v"}), base),
        "sdxl": (single_file.write_sdxl(sdxl, tmp_path / "sdxl.safetensors"), sdxl),
        "flux2": (flux2 / "transformer" / "diffusion_pytorch_model.safetensors", flux2),
    }
    code = f"""
import sys
from simpletuner.cli.choices import family_of, idle_of
from simpletuner.models.offline import shapes, token_counter
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
for name, (path, base) in { {name: (str(path), str(folder)) for name, (path, folder) in files.items()} }.items():
    models = Models(model_family=name, pretrained_model_name_or_path=path, single_file_base_model=base)
    family = family_of(name)(models)
    family.check_source()
    assert shapes(family).assumed == () and token_counter(family)(["a cat"])
    said = [*idle_of(models), *family.notes(), *family.objective_notes(Diffusion()), family.alignment_px]
sys.exit(", ".join({{"torch", "diffusers", "transformers"}} & sys.modules.keys()))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stderr == "\n" and done.returncode == 1  # of sys.exit with words, of which there are none
