"""Options of what is learned: an adapter of some kind, or all weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from simpletuner.options.option import Problem, Section, option


class Adapters(Section):
    """What is learned, and in what form it is saved."""

    model_type: Literal["full", "lora"] = option("lora", ask="Train an adapter (lora), or all weights (full)?")
    """What is trained: `lora` for an adapter of either `lora_type`, `full` for every weight of the denoiser."""

    lora_type: Literal["standard", "lycoris"] = option("standard", ask="Plain LoRA (standard), or LoKr and its relatives (lycoris)?")
    """Kind of adapter: `standard` is plain LoRA, set up by the lora_ options; `lycoris` is set up by the file `lycoris_config`."""

    lora_rank: int = option(16, ask="Rank of the LoRA?", ge=1)
    """Rank of a plain LoRA's matrices: more learns more detail in a larger file. Usual: 4 to 128."""

    lora_alpha: float | None = option(None, gt=0, advanced=True)
    """A plain LoRA is scaled by lora_alpha / lora_rank; equal to the rank, so a scale of 1, if not given."""

    lora_dropout: float = option(0.0, ge=0, lt=1, advanced=True)
    """Share of a plain LoRA's inputs that is left out at random while training."""

    peft_lora_target_modules: list[str] | None = option(None, advanced=True)
    """Endings of the module names that a plain LoRA adapts, e.g. ["to_q", "to_k"]; the family's own list if not given."""

    flux_lora_target: str | None = option(None, advanced=True)
    """A set of targets for a plain LoRA by its name, in place of `peft_lora_target_modules`. Flux 1 has `all`, `context`, `context+ffs`,
    `all+ffs`, `all+ffs+embedder`, `ai-toolkit`, `mmdit`, `tiny` and `nano`; Flux 2 has `all`."""

    use_dora: bool = option(False, advanced=True)
    """Also learn the length of each weight row (DoRA) in a plain LoRA of the denoiser. Slower; needs a base that is not quantised."""

    lora_init_type: Literal["default", "gaussian", "olora", "pissa"] = option("default", advanced=True)
    """How a plain LoRA starts. `olora` and `pissa` start from parts of the base's weights, which must not be quantised."""

    train_text_encoder: bool = option(False)
    """Put a plain LoRA on the CLIP text encoders too, in the same file. They encode captions at every step; what a T5 says is cached."""

    text_encoder_limit: float = option(100.0, gt=0, le=100, advanced=True)
    """Percent of the run after which the text encoders stay as they are, while the denoiser goes on learning."""

    lycoris_config: Path | None = option(None, ask="Path of the LyCORIS file?")
    """JSON file with the algorithm and the targets of a lycoris adapter; config/lycoris_config.json if not given and there."""

    lora_format: Literal["diffusers", "comfyui", "kohya"] = option("diffusers", advanced=True)
    """Names of layers in the file that a run ends with: `diffusers` (of a lycoris adapter that library's), `comfyui` or `kohya`. Checkpoints get
    such a file too, beside the one from which the run goes on."""

    init_lora: Path | None = option(None, advanced=True)
    """Adapter file or folder to start from, made with the same settings."""

    assistant_lora_path: str | None = option(None, advanced=True)
    """File, folder or hub id of a frozen adapter that stands beside the base while training, and not in pictures; `owner/name/file.safetensors`
    names a file on the hub. Flux schnell and Z-Image turbo have one of their own, so that they keep making pictures in few steps."""

    assistant_lora_strength: float = option(1.0, advanced=True)
    """Strength of the assistant while training."""

    assistant_lora_inference_strength: float = option(0.0, advanced=True)
    """Strength of the assistant in pictures."""

    disable_assistant_lora: bool = option(False, advanced=True)
    """Train without an assistant, also where the model has one of its own."""

    init_lokr_norm: float | None = option(None, gt=0, advanced=True)
    """Let a LoKr start as a small random change of this size, usually 1e-3, rather than as none at all."""

    def problems(self) -> Iterator[Problem]:
        if self.train_text_encoder and self.model_type == "full":
            yield Problem(("train_text_encoder", "model_type"), "train_text_encoder is for an adapter: set model_type to lora, or leave it out")
        elif self.train_text_encoder and self.lora_type != "standard":
            keys = ("train_text_encoder", "lora_type")
            yield Problem(keys, "train_text_encoder is for plain LoRA: set lora_type to standard, or leave it out; LyCORIS adapts the denoiser alone")
        if self.model_type == "full" and self.assistant_lora_path is not None and not self.disable_assistant_lora:
            keys = ("assistant_lora_path", "model_type")
            yield Problem(keys, "assistant_lora_path needs model_type lora: weights that are all trained would learn to undo it")
