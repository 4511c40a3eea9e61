from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

from simpletuner.errors import ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def problem(auraflow, folder: Path, **options) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        auraflow(pretrained_model_name_or_path=str(folder), **options).check_source()
    return caught.value


def rename_pipeline(folder: Path, name: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_as_variant(folder: Path, variant: str) -> None:
    """Turn a transformer's weights into shards of a variant, as the hub has them for large models."""
    model = AuraFlowTransformer2DModel.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, variant=variant, max_shard_size="50KB")


def test_a_whole_model_passes_and_a_hub_id_is_not_asked_for(auraflow):
    auraflow().check_source()
    auraflow(pretrained_model_name_or_path="nobody/has-this").check_source()


def test_a_folder_that_is_not_there_is_named(auraflow, tmp_path):
    assert str(tmp_path / "none") in problem(auraflow, tmp_path / "none").message


def test_a_folder_without_a_list_of_parts_says_what_there_is(auraflow, copy):
    (copy / "model_index.json").unlink()

    error = problem(auraflow, copy)

    assert "has no model_index.json" in error.message and "transformer/" in error.hint


def test_a_lone_transformer_is_answered_with_the_option_it_belongs_to(auraflow, copy):
    error = problem(auraflow, copy / "transformer")

    assert "single AuraFlowTransformer2DModel" in error.message and "pretrained_transformer_model_name_or_path" in error.hint


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "sd1x"), ("StableDiffusion3Pipeline", "sd3"), ("FluxPipeline", "flux")],
)
def test_a_model_of_another_family_is_recognised(auraflow, copy, pipeline, family):
    rename_pipeline(copy, pipeline)
    shutil.rmtree(copy / "vae")

    error = problem(auraflow, copy)

    assert pipeline in error.message and "auraflow" in error.message and error.hint.startswith(f"It looks like model_family {family}.")
    assert "vae" not in error.message


def test_everything_that_is_missing_is_said_at_once(auraflow, copy):
    shutil.rmtree(copy / "vae")
    (copy / "text_encoder" / "config.json").unlink()
    (copy / "transformer" / WEIGHTS).unlink()

    message = problem(auraflow, copy).message

    assert "no vae/config.json" in message and "no text_encoder/config.json" in message and "the transformer of" in message


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None], ids=["a pointer of git-lfs", "empty", "cut short"])
def test_weights_that_are_not_whole_are_named_before_anything_is_loaded(auraflow, copy, content):
    path = copy / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)

    assert f"{path} is not a whole safetensors file" in problem(auraflow, copy).message


def test_training_from_scratch_wants_the_denoisers_configuration_alone(auraflow, copy):
    (copy / "transformer" / WEIGHTS).unlink()
    family = auraflow(pretrained_model_name_or_path=str(copy), model_init="random")

    family.check_source()

    (copy / "transformer" / "config.json").unlink()
    assert "no transformer/config.json" in problem(auraflow, copy, model_init="random").message


def test_a_replaced_part_is_checked_where_it_is(auraflow, tiny, copy):
    shutil.rmtree(copy / "vae")

    auraflow(pretrained_model_name_or_path=str(copy), pretrained_vae_model_name_or_path=str(tiny)).check_source()

    assert "./none, where the vae should be, does not exist" in problem(auraflow, copy, pretrained_vae_model_name_or_path="./none").message


def test_a_saved_model_is_one_that_diffusers_loads_with_the_trained_weights(auraflow, tiny, tmp_path):
    family = auraflow()
    denoiser = family.load_denoiser(torch.float32, seed=0)
    with torch.no_grad():
        denoiser.proj_out.weight.add_(1.0)

    family.save_pipeline(denoiser, tmp_path / "pipeline")

    loaded = AuraFlowPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(loaded.transformer.proj_out.weight, denoiser.proj_out.weight)
    for name in ("text_encoder", "tokenizer", "vae", "scheduler"):
        assert contents(tmp_path / "pipeline" / name) == contents(tiny / name)
    assert loaded("a cat", height=16, width=16, num_inference_steps=1, max_sequence_length=8).images[0].size == (16, 16)


def test_a_saved_model_names_no_path_of_this_machine(auraflow, copy, tmp_path):
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**config, "_name_or_path": str(copy)}))
    family = auraflow(pretrained_model_name_or_path=str(copy))

    family.save_pipeline(family.load_denoiser(torch.float32, seed=0), tmp_path / "pipeline")

    assert not [name for name, content in contents(tmp_path / "pipeline").items() if str(tmp_path).encode() in content]


def test_a_saved_model_takes_the_place_of_an_earlier_one_and_leaves_nothing_beside_it(auraflow, tmp_path):
    family = auraflow()
    denoiser = family.load_denoiser(torch.float32, seed=0)
    family.save_pipeline(denoiser, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "leftover").touch()

    family.save_pipeline(denoiser, tmp_path / "pipeline")

    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"] and not (tmp_path / "pipeline" / "leftover").exists()


def test_a_model_may_be_saved_over_the_one_it_was_loaded_from(auraflow, copy, tiny):
    family = auraflow(pretrained_model_name_or_path=str(copy))

    family.save_pipeline(family.load_denoiser(torch.float32, seed=0), copy)

    assert contents(copy / "vae") == contents(tiny / "vae")


def test_shards_of_a_variant_are_loaded_and_saved_as_plain_files(auraflow, copy, tiny, tmp_path):
    shard_as_variant(copy / "transformer", "fp16")
    (copy / "vae" / WEIGHTS).rename(copy / "vae" / WEIGHTS.replace(".", ".fp16.", 1))
    family = auraflow(pretrained_model_name_or_path=str(copy), variant="fp16")
    family.check_source()

    family.save_pipeline(family.load_denoiser(torch.float32, seed=0), tmp_path / "pipeline")

    saved, plain = AuraFlowPipeline.from_pretrained(tmp_path / "pipeline"), AuraFlowPipeline.from_pretrained(tiny)
    for name in ("transformer", "vae", "text_encoder"):
        for ours, theirs in zip(getattr(saved, name).parameters(), getattr(plain, name).parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_sharded_variant_of_another_part_is_copied_as_plain_shards(auraflow, copy, tmp_path):
    family = auraflow(pretrained_model_name_or_path=str(copy))
    vae = family.load_vae(torch.device("cpu"), torch.float32)
    (copy / "vae" / WEIGHTS).unlink()
    vae.save_pretrained(copy / "vae", variant="fp16", max_shard_size="50KB")
    family = auraflow(pretrained_model_name_or_path=str(copy), variant="fp16")

    family.save_pipeline(family.load_denoiser(torch.float32, seed=0), tmp_path / "pipeline")

    assert not list((tmp_path / "pipeline").rglob("*fp16*"))
    loaded = AuraFlowPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(loaded.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
