"""Options of what is learned: an adapter of some kind, or all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from simpletuner.options.option import Section, option


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
    """Also learn the length of each weight row (DoRA) in a plain LoRA. Slower; needs a base that is not quantised."""

    lora_init_type: Literal["default", "gaussian", "olora", "pissa"] = option("default", advanced=True)
    """How a plain LoRA starts. `olora` and `pissa` start from parts of the base's weights, which must not be quantised."""

    lycoris_config: Path | None = option(None, ask="Path of the LyCORIS file?")
    """JSON file with the algorithm and the targets of a lycoris adapter; config/lycoris_config.json if not given and there."""

    init_lora: Path | None = option(None, advanced=True)
    """Adapter file or folder to start from, made with the same settings."""

    init_lokr_norm: float | None = option(None, gt=0, advanced=True)
    """Let a LoKr start as a small random change of this size, usually 1e-3, rather than as none at all."""
