"""Options that make a large model fit: precisions, and what is recomputed instead of kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from simpletuner.options.option import Problem, Section, option

WEIGHTS = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}
"""`mixed_precision` to the dtype that a frozen base is held in, in words."""
TRAINED = {"fp32": "float32", "bf16": "bf16"}
"""The same of `base_model_default_dtype`."""
NO_GRADIENT = "torchao's own weights of 4 bits give no gradient to what they multiply; int4-torchao does, nf4-bnb is as small"
INSTEAD = {"int8dq-int4-torchao": NO_GRADIENT, "fp8-int4-torchao": NO_GRADIENT}
OFFLOADS = ("blocks_to_swap", "max_resident_weights", "enable_group_offload")
"""Options of which one alone can say what is offloaded."""
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def size_in_bytes(text: str) -> int:
    """Read a size as people write it: 6GB, 6.5 gb, 512MiB; a bare number is bytes, and refused below a million, which is hardly meant.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip().lower())
    size = float(found[1]) * UNITS.get(found[2], 0) if found else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size: write it as 6GB or 512MiB")
    assert found is not None
    if not found[2] and size < UNITS["mb"]:
        raise ValueError(f"{text!r} has no unit, and would be bytes: write it as {found[1]}GB")
    return int(size)


class Memory(Section):
    """In what precision the frozen parts are held, and what is traded for memory."""

    mixed_precision: Literal["no", "bf16", "fp16"] = option("bf16", ask="Compute in bf16, fp16 or full precision (no)?")
    """Number format that the frozen base is held and computed in; `no` is float32. Adapters stay in float32."""

    base_model_default_dtype: Literal["default", "bf16", "fp32"] = option("default", spellings={"bfloat16": "bf16", "float32": "fp32"}, advanced=True)
    """Format of the weights that `model_type` full trains; their gradients have it too. `default` is bf16 with `mixed_precision` bf16 and an
    `optimizer` that loses no small updates by it, and fp32 otherwise. Adapters are always fp32."""

    base_model_precision: str = option("no_change", ask="Quantise the base model to save memory?", choices_from="precision", instead=INSTEAD)
    """Format that the frozen base's weights are quantised to. `int8-quanto` halves bf16 at hardly any loss."""

    quantize_via: Literal["accelerator", "cpu"] = option("accelerator", spellings={"pipeline": "accelerator"}, advanced=True)
    """Where layers are quantised, one after the other. `cpu` keeps even one layer in 16 bits off the accelerator, and is slower."""

    keep_quantised_weights: bool = option(True, advanced=True)
    """Keep quantised weights in `cache_dir`, so that the next start on the same base reads them instead of quantising again."""

    eight_bit_products: Literal["auto", "all", "none"] = option("auto", advanced=True)
    """Which layers of a base in int8-matmul, int8-rotated or fp8-matmul multiply in 8 bits: with `auto` those where that is faster on this machine,
    measured for a second at the first start; `none` makes all weights plain for each product. A run that goes on does as before."""

    text_encoder_1_precision: str = option("no_change", choices_from="precision", instead=INSTEAD, advanced=True)
    """The same for the first text encoder, which is loaded only while captions are encoded."""

    text_encoder_2_precision: str = option("no_change", choices_from="precision", instead=INSTEAD, advanced=True)
    """The same for the second text encoder, where the family has one."""

    text_encoder_3_precision: str = option("no_change", choices_from="precision", instead=INSTEAD, advanced=True)
    """The same for the third text encoder, where the family has one."""

    text_encoder_4_precision: str = option("no_change", choices_from="precision", instead=INSTEAD, advanced=True)
    """The same for the fourth text encoder, where the family has one."""

    vae_dtype: Literal["default", "fp32", "fp16", "bf16"] = option("default", advanced=True)
    """Number format of the VAE. `default` is bf16 on an accelerator and fp32 on the CPU."""

    gradient_checkpointing: bool = option(True, ask="Save memory by computing activations twice?", was=["use_gradient_checkpointing"])
    """Keep few activations and compute the rest again on the way back: much less memory, about a fifth more time."""

    gradient_checkpointing_backend: Literal["torch", "selective", "offload"] = option(
        "torch", spellings={"torch-ffn": "selective", "unsloth": "offload", "unsloth-ffn": "offload"}, advanced=True
    )
    """What is kept of a block that is computed again: `torch` its input, `selective` also what its attention answered, which is dear to
    compute and small; `offload` its input, in main memory."""

    gradient_checkpointing_offload_bytes: int = option(10_000_000, ge=0, advanced=True)
    """With `gradient_checkpointing_backend` offload, inputs of fewer bytes stay on the accelerator."""

    gradient_checkpointing_interval: int = option(0, ge=0, advanced=True)
    """Of each `gradient_checkpointing_segment_stride` blocks this many are computed again, and the others keep their activations; 0 is 1."""

    gradient_checkpointing_segment_stride: int = option(0, ge=0, advanced=True)
    """Counts off the blocks for `gradient_checkpointing_interval`: 2 computes every other block again. 0 is all blocks."""

    attention_mechanism: str = option("diffusers", choices_from="attention", spellings={"sdpa": "native", "sage": "sageattention"}, advanced=True)
    """The kernels that the denoiser's attention is computed with. `diffusers` is PyTorch's own, which is rarely beaten."""

    sageattention_usage: Literal["inference", "training", "training+inference"] = option("inference", advanced=True)
    """Where an `attention_mechanism` of SageAttention is used; elsewhere it is PyTorch's. In training its gradients are those of exact
    attention, which is computed again for them."""

    keep_vae_loaded: bool = option(False, advanced=True)
    """Keep the VAE on the accelerator while training, rather than load it for each validation."""

    blocks_to_swap: int = option(0, ge=0, was=["musubi_blocks_to_swap"])
    """Blocks of a frozen base that wait in main memory and are copied to the accelerator while others compute. Each saves its size, but for
    the two that are there at a time; all of them may wait."""

    max_resident_weights: str | None = option(None)
    """The same by what is to stay: have as few blocks wait as it takes to hold this much of the base on the accelerator, such as `6GB`."""

    enable_group_offload: bool = option(False)
    """The same with all blocks: the accelerator holds those that compute and the next ones."""

    group_offload_blocks_per_group: int = option(1, ge=1, advanced=True)
    """Blocks that `enable_group_offload` lets compute together; as many more are on their way."""

    group_offload_to_disk_path: Path | None = option(None, advanced=True)
    """Folder on a fast disk for files in which the blocks of `enable_group_offload` wait. Main memory then holds as much of them as it has
    room for."""

    enable_model_cpu_offload: bool = option(False, advanced=True)
    """Have text encoders, VAE and denoiser in memory one after the other, each as a whole. That is always so."""

    vae_enable_slicing: bool = option(False, advanced=True)
    """Let the VAE work on one image of a batch after the other."""

    vae_enable_tiling: bool = option(False, advanced=True)
    """Let the VAE work on an image in tiles. Saves memory with large images; seams may show."""

    def problems(self) -> Iterator[Problem]:
        if self.base_model_default_dtype == "bf16" != self.mixed_precision:
            keys = ("base_model_default_dtype", "mixed_precision")
            yield Problem(keys, f"{keys[0]} bf16 needs {keys[1]} bf16, which is {self.mixed_precision}")
        interval, stride = self.gradient_checkpointing_interval, self.gradient_checkpointing_segment_stride
        if 0 < stride < interval:
            keys = ("gradient_checkpointing_segment_stride", "gradient_checkpointing_interval")
            yield Problem(keys, f"{keys[0]} {stride} is below {keys[1]} {interval}: of each {stride} blocks there are no {interval}")
        yield from self._offload_problems()

    def _offload_problems(self) -> Iterator[Problem]:
        asked = [key for key in OFFLOADS if getattr(self, key)]
        if len(asked) > 1:
            yield Problem(tuple(asked), f"{' and '.join(asked)} exclude each other: each says which blocks wait in main memory")
        if self.enable_group_offload and self.enable_model_cpu_offload:
            keys = ("enable_group_offload", "enable_model_cpu_offload")
            yield Problem(keys, f"{' and '.join(keys)} exclude each other: the denoiser comes block by block, or as a whole")
        if self.max_resident_weights is not None:
            try:
                size_in_bytes(self.max_resident_weights)
            except ValueError as error:
                yield Problem(("max_resident_weights",), f"max_resident_weights {error}")
