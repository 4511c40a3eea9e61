"""Models from one file in the layout of their makers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.cli.choices import family_of
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.models.single_file import is_single_file, parse_address
from simpletuner.options.diffusion import Diffusion
from simpletuner.options.models import Models
from tests.builders import single_file
from tests.builders.auraflow import build_tiny_auraflow
from tests.builders.flux import build_tiny_flux
from tests.builders.sd3 import build_tiny_sd3
from tests.builders.stable_diffusion import build_tiny_sd1, build_tiny_sdxl

CPU = torch.device("cpu")
FAMILIES = {
    "sdxl": (build_tiny_sdxl, single_file.write_sdxl),
    "sd1x": (build_tiny_sd1, single_file.write_sd1),
    "sd2x": (build_tiny_sd1, single_file.write_sd2),
    "sd3": (build_tiny_sd3, single_file.write_sd3),
    "auraflow": (build_tiny_auraflow, single_file.write_auraflow),
}


def build(name: str, location: Path | str, base: Path | None, **options) -> ModelFamily:
    return family_of(name)(
        Models(model_family=name, pretrained_model_name_or_path=str(location), single_file_base_model=None if base is None else str(base), **options)
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A whole tiny model of a family, another one as its base, and the first as a single file; made when first asked for."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            folder, (make, write) = tmp_path_factory.mktemp(name), FAMILIES[name]
            model, base = make(folder / "model", seed=1), make(folder / "base", seed=2)
            made[name] = model, base, write(model, folder / f"{name}.safetensors")
        return made[name]

    return get


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_a_single_file_is_the_one_that_was_written(files, name):
    model, base, path = files(name)
    single, whole, other = build(name, path, base), build(name, model, None), build(name, base, None)
    single.check_source()

    denoisers = [family.load_denoiser(torch.float32, 0) for family in (single, whole, other)]
    assert same(denoisers[0], denoisers[1]) and not same(denoisers[0], denoisers[2])
    assert same(single.load_vae(CPU, torch.float32), whole.load_vae(CPU, torch.float32))
    encoders = [family.text_modules(family.load_text_encoders(CPU, torch.float32)) for family in (single, whole, other)]
    given = [part for part, _ in single.text_parts if single.source.part(part).checkpoint is not None]
    assert len(given) == (0 if name == "auraflow" else len(single.text_parts))
    for (part, _), mine, theirs, bases in zip(single.text_parts, *encoders, strict=True):
        if name == "sd3" and part == "text_encoder":  # whose projection is not in the file: the identity
            assert torch.equal(mine.text_projection.weight, torch.eye(16))
            theirs.text_projection.weight.copy_(torch.eye(16))
        assert same(mine, theirs if part in given else bases)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_parts_come_frozen_in_the_wanted_precision_and_draw_nothing(files, name):
    _, base, path = files(name)
    family = build(name, path, base)
    before = torch.random.get_rng_state()

    networks = [family.load_denoiser(torch.bfloat16, 0), family.load_vae(CPU, torch.bfloat16)]
    networks += family.text_modules(family.load_text_encoders(CPU, torch.bfloat16))

    assert torch.equal(torch.random.get_rng_state(), before)
    for network in networks:
        assert not network.training
        assert {(parameter.dtype, parameter.requires_grad, parameter.device.type) for parameter in network.parameters()} == {
            (torch.bfloat16, False, "cpu")
        }


def test_a_file_of_the_denoiser_alone_leaves_the_rest_to_the_base(files, tmp_path):
    model, base, _ = files("sdxl")
    unet = single_file.save(single_file.ldm_unet(model), tmp_path / "unet.safetensors")
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes((model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    whole, other = build("sdxl", model, None), build("sdxl", base, None)

    for path in (unet, plain):
        by_model, by_part = build("sdxl", path, base), build("sdxl", base, None, pretrained_unet_model_name_or_path=str(path))
        for family in (by_model, by_part):
            family.check_source()
            assert same(family.load_denoiser(torch.float32, 0), whole.load_denoiser(torch.float32, 0))
            assert same(family.load_vae(CPU, torch.float32), other.load_vae(CPU, torch.float32))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_may_be_a_file_of_its_own(files, tmp_path, prefix):
    model, base, _ = files("sdxl")
    path = single_file.save(single_file.under(prefix, single_file.ldm_vae(model)), tmp_path / "vae.safetensors")
    family = build("sdxl", base, None, pretrained_vae_model_name_or_path=str(path))
    family.check_source()

    assert same(family.load_vae(CPU, torch.float32), build("sdxl", model, None).load_vae(CPU, torch.float32))
    assert family.vae_fingerprint() != build("sdxl", base, None).vae_fingerprint()


def test_the_fingerprint_of_a_file_is_its_content_and_not_its_name(files, tmp_path):
    _, base, path = files("sd1x")
    moved = tmp_path / "renamed.safetensors"
    moved.write_bytes(path.read_bytes())
    changed = tmp_path / "changed.safetensors"
    tensors = load_file(path)
    tensors["first_stage_model.quant_conv.bias"] += 1
    save_file(tensors, changed)

    prints = [build("sd1x", name, base).vae_fingerprint() for name in (path, moved, changed)]

    assert prints[0] == prints[1] != prints[2]


def test_a_flux_transformer_with_the_names_of_diffusers_is_read_too(tmp_path):
    model, base = build_tiny_flux(tmp_path / "model", seed=1), build_tiny_flux(tmp_path / "base", seed=2)
    path = tmp_path / "flux.safetensors"
    path.write_bytes((model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())

    family = build("flux", path, base)
    family.check_source()

    assert same(family.load_denoiser(torch.float32, 0), build("flux", model, None).load_denoiser(torch.float32, 0))


def test_a_whole_model_is_saved_in_diffusers_layout(files, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    model, base, _ = files("sdxl")
    path = single_file.write_sdxl(model, tmp_path / "v.safetensors", v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    family = build("sdxl", path, base)

    family.save_pipeline(family.load_denoiser(torch.float32, 0), tmp_path / "saved")

    saved, whole = (StableDiffusionXLPipeline.from_pretrained(folder) for folder in (tmp_path / "saved", model))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same(getattr(saved, part), getattr(whole, part))
    assert saved.scheduler.config.prediction_type == "v_prediction" and saved.scheduler.config.rescale_betas_zero_snr


V_PRED = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("marks", "metadata", "schedule"),
    [
        ([], {}, {}),
        (["v_pred"], {}, V_PRED),
        (["v_pred", "ztsnr"], {}, {**V_PRED, **ZERO_SNR}),
        ([], {"modelspec.prediction_type": "v"}, V_PRED),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, V_PRED),
    ],
)
def test_the_marks_of_velocity_and_of_a_last_step_of_noise_are_seen(files, tmp_path, marks, metadata, schedule):
    model, base, _ = files("sdxl")
    path = single_file.write_sdxl(model, tmp_path / "m.safetensors", metadata=metadata, **{mark: torch.tensor([]) for mark in marks})
    family = build("sdxl", path, base)

    process, trained = family.process(Diffusion()), family.training_schedule(Diffusion()).config
    sampled = family.sampling_schedule(Diffusion()).config

    assert process.prediction == trained.prediction_type == sampled.prediction_type == schedule.get("prediction_type", "epsilon")
    assert bool(trained.rescale_betas_zero_snr) == bool(sampled.rescale_betas_zero_snr) == ("ztsnr" in marks)
    assert (process.alphas[-1] < 1e-6) == ("ztsnr" in marks)
    assert sampled.timestep_spacing == schedule.get("timestep_spacing", "leading")
    assert any("v_prediction" in note for note in family.notes()) == bool(schedule)


def test_an_option_wins_over_the_marks_and_the_contradiction_is_said(files, tmp_path):
    model, base, _ = files("sdxl")
    path = single_file.write_sdxl(model, tmp_path / "m.safetensors", v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    family = build("sdxl", path, base)
    options = Diffusion(prediction_type="epsilon", rescale_betas_zero_snr=False)

    assert family.process(options).prediction == "epsilon"
    assert family.process(options).alphas[-1] > 1e-6
    said = family.objective_notes(options)
    assert [note.split()[0] for note in said] == ["prediction_type", "rescale_betas_zero_snr"]
    assert '"v_prediction"' in said[0] and str(path) in said[0]
    assert family.objective_notes(Diffusion(prediction_type="v_prediction")) == family.objective_notes(Diffusion()) == []


def test_what_a_file_gives_and_what_its_base_gives_is_said(files):
    _, base, path = files("auraflow")

    assert f"vae, transformer from {path}; text_encoder, tokenizer, scheduler from {base}" in build("auraflow", path, base).notes()


@pytest.mark.parametrize("cut", [7, 500, -1000])
def test_a_truncated_file_is_refused_before_anything_is_loaded(files, tmp_path, cut):
    _, base, path = files("sd1x")
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(ConfigError, match="is not a whole safetensors file"):
        build("sd1x", short, base).check_source()


def test_a_file_of_another_family_is_named_with_the_family_to_set(files):
    _, base, path = files("sd3")

    with pytest.raises(ConfigError, match="is a Stable Diffusion 3 transformer; model_family sdxl cannot be trained from it") as caught:
        build("sdxl", path, base).check_source()

    assert caught.value.hint == "Set model_family to sd3."


def test_a_base_that_is_not_there_is_named_by_its_option(files, tmp_path):
    with pytest.raises(ConfigError, match=r"single_file_base_model .*nowhere is not a folder"):
        build("sdxl", files("sdxl")[2], tmp_path / "nowhere").check_source()


def test_a_base_of_another_family_is_refused(files):
    _, base, _ = files("sd1x")
    path = files("sdxl")[2]

    with pytest.raises(ConfigError, match="is a StableDiffusionPipeline, and model_family sdxl needs"):
        build("sdxl", path, base).check_source()


def test_an_adapter_given_as_the_model_is_named(files, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 8), "lora_unet_down_blocks_0.lora_up.weight": torch.zeros(8, 4)}, path)

    with pytest.raises(ConfigError, match="is an adapter") as caught:
        build("sdxl", path, files("sdxl")[1]).check_source()

    assert "init_lora" in caught.value.hint


def test_a_file_that_lacks_a_tensor_or_has_another_size_is_refused_with_the_way_out(files, tmp_path):
    _, base, path = files("sdxl")
    tensors = load_file(path)
    gone = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "gap.safetensors")
    save_file({**tensors, gone: torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")

    for name in ("gap", "wrong"):
        with pytest.raises(ConfigError, match=r"the unet of .* does not fit the unet/config.json of") as caught:
            build("sdxl", tmp_path / f"{name}.safetensors", base).load_denoiser(torch.float32, 0)
        assert "single_file_base_model" in caught.value.hint


def test_a_text_encoder_with_a_gap_is_refused(files, tmp_path):
    _, base, path = files("sdxl")
    tensors = load_file(path)
    gone = "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "gap.safetensors")

    with pytest.raises(ConfigError, match=r"the text_encoder of .* it lacks .*encoder\.layers\.1\.mlp\.fc1\.bias"):
        build("sdxl", tmp_path / "gap.safetensors", base).load_text_encoders(CPU, torch.float32)


@pytest.mark.parametrize("ending", ["ckpt", "gguf", "pt"])
def test_files_that_are_not_read_are_refused_with_the_way_out(tmp_path, ending):
    (tmp_path / f"model.{ending}").write_bytes(b"GGUF")

    with pytest.raises(ConfigError, match=r"pickled|GGUF") as caught:
        build("sdxl", tmp_path / f"model.{ending}", None).check_source()

    assert "safetensors" in caught.value.hint


def test_scaled_weights_are_refused(files, tmp_path):
    _, base, path = files("sdxl")
    save_file({**load_file(path), "scaled_fp8": torch.zeros(2)}, tmp_path / "scaled.safetensors")

    with pytest.raises(ConfigError, match="is quantised"):
        build("sdxl", tmp_path / "scaled.safetensors", base).check_source()


def test_a_path_that_leads_nowhere_and_an_address_elsewhere_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        build("sdxl", tmp_path / "none.safetensors", None).check_source()
    with pytest.raises(ConfigError, match="is not on the hub") as caught:
        build("sdxl", "https://example.com/a/b/resolve/main/model.safetensors", None).check_source()
    assert "Download" in caught.value.hint


def test_addresses_of_files_are_taken_apart():
    for verb in ("blob", "resolve"):
        address = f"https://huggingface.co/maker/model/{verb}/v1/folder/my%20model.safetensors?download=true"
        assert is_single_file(address)
        assert parse_address(address) == ("maker/model", "folder/my model.safetensors", "v1")
    with pytest.raises(ConfigError, match="is no file of a repository"):
        parse_address("https://huggingface.co/maker/model.safetensors")
    assert not is_single_file("maker/model") and not is_single_file("maker/model-v1.5")
