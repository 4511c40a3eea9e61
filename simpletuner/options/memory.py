"""Options that make a large model fit: precisions, and what is recomputed instead of kept."""

from __future__ import annotations

from typing import Literal

from simpletuner.options.option import Section, option

WEIGHTS = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}
"""`mixed_precision` to the dtype that a frozen base is held in, in words."""


class Memory(Section):
    """In what precision the frozen parts are held, and what is traded for memory."""

    mixed_precision: Literal["no", "bf16", "fp16"] = option("bf16", ask="Compute in bf16, fp16 or full precision (no)?")
    """Number format that the frozen base is held and computed in; `no` is float32. What is trained stays in float32."""

    base_model_precision: str = option("no_change", ask="Quantise the base model to save memory?", choices_from="precision")
    """Format that the frozen base's weights are quantised to. `int8-quanto` halves bf16 at hardly any loss."""

    text_encoder_1_precision: str = option("no_change", choices_from="precision", advanced=True)
    """The same for the first text encoder, which is loaded only while captions are encoded."""

    text_encoder_2_precision: str = option("no_change", choices_from="precision", advanced=True)
    """The same for the second text encoder, where the family has one."""

    text_encoder_3_precision: str = option("no_change", choices_from="precision", advanced=True)
    """The same for the third text encoder, where the family has one."""

    text_encoder_4_precision: str = option("no_change", choices_from="precision", advanced=True)
    """The same for the fourth text encoder, where the family has one."""

    vae_dtype: Literal["default", "fp32", "fp16", "bf16"] = option("default", advanced=True)
    """Number format of the VAE. `default` is bf16 on an accelerator and fp32 on the CPU."""

    gradient_checkpointing: bool = option(True, ask="Save memory by computing activations twice?", was=["use_gradient_checkpointing"])
    """Keep few activations and compute the rest again on the way back: much less memory, about a fifth more time."""

    vae_enable_slicing: bool = option(False, advanced=True)
    """Let the VAE work on one image of a batch after the other."""

    vae_enable_tiling: bool = option(False, advanced=True)
    """Let the VAE work on an image in tiles. Saves memory with large images; seams may show."""
