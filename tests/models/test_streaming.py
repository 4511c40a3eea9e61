"""Networks that are read layer by layer are those that the libraries read whole: every number, dtype and buffer, of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.cli.choices import family_of
from simpletuner.errors import ConfigError
from simpletuner.memory.settle import recipe_of
from simpletuner.models import streaming
from simpletuner.models.mapped import MappedFile
from simpletuner.options.models import Models
from tests.builders import single_file
from tests.builders.stable_diffusion import build_tiny_sdxl
from tests.training import families

CPU = torch.device("cpu")


def held(network: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers(remove_duplicate=False))}


def check_equal(streamed: nn.Module, whole: nn.Module) -> None:
    ours, theirs = held(streamed), held(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
        assert not value.requires_grad
    assert not streamed.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", families.TINY)
def test_a_streamed_network_is_the_one_that_the_library_reads(name, dtype):
    family = families.family(name)
    recipe = recipe_of("no_change", dtype, CPU)
    before = torch.random.get_rng_state()

    streamed = [family.load_frozen(recipe, 0), *family.text_modules(family.load_text_encoders(CPU, dtype, [recipe] * 4))]

    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    whole = [family.load_denoiser(dtype, 0), *family.text_modules(family.load_text_encoders(CPU, dtype))]
    for ours, theirs in zip(streamed, whole, strict=True):
        check_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_file_streams_too(tmp_path, dtype):
    model, base = build_tiny_sdxl(tmp_path / "model", seed=1), build_tiny_sdxl(tmp_path / "base", seed=2)
    path = single_file.write_sdxl(model, tmp_path / "sdxl.safetensors")
    family = family_of("sdxl")(Models(model_family="sdxl", pretrained_model_name_or_path=str(path), single_file_base_model=str(base)))
    recipe = recipe_of("no_change", dtype, CPU)

    check_equal(family.load_frozen(recipe, 0), family.load_denoiser(dtype, 0))
    for ours, theirs in zip(*(family.text_modules(family.load_text_encoders(CPU, dtype, given)) for given in ([recipe] * 2, []))):
        check_equal(ours, theirs)


def test_the_weights_of_a_single_file_are_views_until_they_are_settled(tmp_path, monkeypatch):
    model = build_tiny_sdxl(tmp_path / "model", seed=1)
    path = single_file.write_sdxl(model, tmp_path / "sdxl.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    family = family_of("sdxl")(Models(model_family="sdxl", pretrained_model_name_or_path=str(path), single_file_base_model=str(model)))
    seen: list[torch.dtype] = []
    real = streaming.settle_layers
    monkeypatch.setattr(
        streaming, "settle_layers", lambda network, *others: (seen.extend(p.dtype for p in network.parameters()), real(network, *others))[1]
    )

    family.load_frozen(recipe_of("no_change", torch.bfloat16, CPU), 0)

    assert set(seen) == {torch.float16}  # not a copy in another dtype


def test_what_was_read_does_not_change_when_the_file_does(tmp_path):
    family = families.family("auraflow")
    denoiser = family.load_frozen(recipe_of("no_change", torch.float32, CPU), 0)
    before = {name: value.clone() for name, value in held(denoiser).items()}

    for path in family.source.part("transformer").folder().glob("*.safetensors"):
        kept = path.read_bytes()
        try:
            with path.open("r+b") as file:
                file.seek(len(kept) // 2)
                file.write(bytes(len(kept) // 4))
            assert all(torch.equal(value, before[name]) for name, value in held(denoiser).items())
        finally:
            path.write_bytes(kept)


def test_views_are_the_tensors_of_the_file_and_can_be_forgotten(tmp_path):
    tensors = {"a": torch.randn(300, 7), "b": torch.arange(5), "c": torch.randn(3).bfloat16(), "d": torch.empty(0, 4), "e": torch.tensor(True)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})

    file = MappedFile(tmp_path / "x.safetensors")

    for _ in range(2):
        assert file.tensors.keys() == tensors.keys() and all(torch.equal(file.tensors[name], value) for name, value in tensors.items())
        file.forget()
    assert file.metadata == {"format": "pt"}


@pytest.mark.parametrize("cut", [3, 40, -7])
def test_a_file_that_is_cut_short_is_refused(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(300, 7)}, path)
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(ValueError):
        MappedFile(path)


def test_weights_with_a_gap_are_refused_by_name(tmp_path):
    model = build_tiny_sdxl(tmp_path / "model", seed=1)
    path = next((model / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path, {"format": "pt"})
    family = family_of("sdxl")(Models(model_family="sdxl", pretrained_model_name_or_path=str(Path(model))))

    with pytest.raises(ConfigError, match=r"lack 1 tensors .*conv_in\.weight"):
        family.load_frozen(recipe_of("no_change", torch.float32, CPU), 0)
