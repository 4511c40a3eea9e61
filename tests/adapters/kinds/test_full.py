"""Full training of the denoiser's own weights."""

from __future__ import annotations

import json

import pytest
import torch

from simpletuner.errors import ConfigError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_base_is_trained_in_the_precision_in_which_it_was_loaded(make_denoiser, make_adapter, dtype):
    denoiser, adapter = make_denoiser(dtype), make_adapter(model_type="full")

    attached = adapter.attach(denoiser)

    assert adapter.trains_base
    assert {parameter.dtype for parameter in adapter.parameters().values()} == {dtype}
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
    assert attached.parameters == sum(parameter.numel() for parameter in denoiser.parameters())


def test_diffusers_loads_the_folder_and_we_load_it_back(make_denoiser, make_adapter, run, perturb, tmp_path):
    from diffusers import AuraFlowTransformer2DModel

    denoiser, adapter, again = make_denoiser(), make_adapter(model_type="full"), make_adapter(model_type="full")
    adapter.attach(denoiser)
    perturb(adapter)
    again.attach(make_denoiser())

    adapter.save(tmp_path, {"step": "5"})
    again.load(tmp_path)

    assert all(torch.equal(value, again.tensors()[name]) for name, value in adapter.tensors().items())
    assert run(AuraFlowTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")).equal(run(denoiser))
    assert json.loads((tmp_path / "simpletuner_metadata.json").read_text()) == {"step": "5"}


def test_a_saved_model_does_not_say_where_it_came_from(make_denoiser, make_adapter, tmp_path):
    from diffusers import AuraFlowTransformer2DModel

    make_denoiser().save_pretrained(tmp_path / "base")
    adapter = make_adapter(model_type="full")
    adapter.attach(AuraFlowTransformer2DModel.from_pretrained(tmp_path / "base"))

    adapter.save(tmp_path / "output", {})

    assert str(tmp_path) not in (tmp_path / "output/transformer/config.json").read_text()


def test_weights_in_several_files_are_read_back(make_denoiser, make_adapter, perturb, tmp_path):
    denoiser, adapter, again = make_denoiser(), make_adapter(model_type="full"), make_adapter(model_type="full")
    adapter.attach(denoiser)
    perturb(adapter)
    again.attach(make_denoiser())
    denoiser.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")

    again.load(tmp_path)

    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert all(torch.equal(value, again.tensors()[name]) for name, value in adapter.tensors().items())


def test_a_folder_without_or_with_other_weights_is_refused(make_denoiser, make_adapter, tmp_path):
    adapter = make_adapter(model_type="full")
    adapter.attach(make_denoiser())

    with pytest.raises(ConfigError, match="no weights"):
        adapter.load(tmp_path)
    adapter.save(tmp_path, {})
    other = make_adapter(model_type="full")
    other.attach(torch.nn.ModuleDict({"proj": torch.nn.Linear(2, 2)}))
    with pytest.raises(ConfigError, match="unused"):
        other.load(tmp_path)


def test_strength_is_1_or_refused(make_denoiser, make_adapter):
    adapter = make_adapter(model_type="full")
    adapter.attach(make_denoiser())

    adapter.set_strength(1.0)
    with pytest.raises(ConfigError, match="no strength but 1"):
        adapter.set_strength(0.0)


def test_the_snippet_is_python_and_names_the_denoisers_class(make_denoiser, make_adapter):
    adapter = make_adapter(model_type="full")
    adapter.attach(make_denoiser())

    text = adapter.snippet("AuraFlowPipeline", "some/base", {"prompt": "seven"}, "output")

    compile(text, "snippet", "exec")
    assert "AuraFlowTransformer2DModel.from_pretrained('output', subfolder='transformer'" in text
