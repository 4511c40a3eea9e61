"""The inference code of the quickstarts, on tiny models: what their users paste must render what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from lycoris import create_lycoris_from_weights
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from tests.builders.finished import write_finished
from tests.training.families import model

QUICKSTART = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 8}}},
}
LOW_RANK = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 2, "linear_alpha": 1, "factor": 4, "apply_preset": {"target_module": ["Attention"]}}
CALL = {"width": 32, "height": 32, "num_inference_steps": 2, "max_sequence_length": 24}


def file_of(folder: Path, name: str, lycoris: dict) -> str:
    """The adapter file of a run of this family."""
    options = {"model_family": name, "pretrained_model_name_or_path": str(model(name)), "tokenizer_max_length": 24}
    write_finished(folder, lycoris, size=0.3, **options)
    return str(folder / "pytorch_lora_weights.safetensors")


def pixels(image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def test_auraflows_quickstart_merges_the_file_and_renders(tmp_path):
    adapter_file_path = file_of(tmp_path / "run", "auraflow", QUICKSTART)
    model_id = model("auraflow")
    transformer = AuraFlowTransformer2DModel.from_pretrained(model_id, torch_dtype=torch.float32, subfolder="transformer")
    pipeline = AuraFlowPipeline.from_pretrained(model_id, torch_dtype=torch.float32, transformer=transformer)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    lora_scale = 1.0

    wrapper, _ = create_lycoris_from_weights(lora_scale, adapter_file_path, pipeline.transformer)
    wrapper.merge_to()

    t5_embeds, attention_mask, negative_t5_embeds, negative_attention_mask = pipeline.encode_prompt(
        prompt="Place your test prompt here.", negative_prompt="ugly, cropped", max_sequence_length=24
    )
    model_output = pipeline(
        prompt_embeds=t5_embeds,
        prompt_attention_mask=attention_mask,
        negative_prompt_embeds=negative_t5_embeds,
        negative_prompt_attention_mask=negative_attention_mask,
        generator=torch.Generator().manual_seed(42),
        guidance_scale=3.2,
        **CALL,
    ).images[0]
    assert pixels(model_output).shape == (32, 32, 3)
    changed = {name for name, value in transformer.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == len(wrapper.loras) == 12


def test_flux_snippet_of_the_lycoris_page_merges_renders_and_saves_a_pipeline(tmp_path):
    lycoris_safetensors_path = file_of(tmp_path / "run", "flux", LOW_RANK)
    bfl_repo, dtype = model("flux"), torch.float32
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(bfl_repo, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(bfl_repo, subfolder="text_encoder", torch_dtype=dtype)
    tokenizer = CLIPTokenizer.from_pretrained(bfl_repo, subfolder="tokenizer")
    text_encoder_2 = T5EncoderModel.from_pretrained(bfl_repo, subfolder="text_encoder_2", torch_dtype=dtype)
    tokenizer_2 = PreTrainedTokenizerFast.from_pretrained(bfl_repo, subfolder="tokenizer_2")
    vae = AutoencoderKL.from_pretrained(bfl_repo, subfolder="vae", torch_dtype=dtype)
    transformer = FluxTransformer2DModel.from_pretrained(bfl_repo, subfolder="transformer")

    def render(pipe: FluxPipeline) -> numpy.ndarray:
        generator = torch.Generator().manual_seed(1)
        return pixels(pipe(prompt="a pokemon that looks like a pizza", generator=generator, guidance_scale=3.5, **CALL).images[0])

    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    base = render(pipe)

    lycoris_strength = 1.0
    wrapper, _ = create_lycoris_from_weights(lycoris_strength, lycoris_safetensors_path, transformer)
    wrapper.merge_to()  # using apply_to() will be slower.
    transformer.to("cpu", dtype=dtype)
    merged = render(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")

    assert numpy.abs(merged - base).max() > 1
    assert numpy.abs(render(FluxPipeline.from_pretrained(tmp_path / "pipeline")) - merged).max() == 0

    # merge_to and apply_to are the same function, which the library alone would not have it for a scale other than 1.
    other = FluxTransformer2DModel.from_pretrained(bfl_repo, subfolder="transformer")
    wrapper, _ = create_lycoris_from_weights(lycoris_strength, lycoris_safetensors_path, other)
    wrapper.apply_to()
    applied = render(FluxPipeline(scheduler=scheduler, vae=vae, transformer=other, **parts))
    assert numpy.abs(applied - merged).max() <= 1
