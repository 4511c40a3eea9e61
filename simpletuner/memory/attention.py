"""One row an attention that a user may name: in what kernels a denoiser compares its tokens, and what those need."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.errors import ConfigError, choose


@dataclass(frozen=True, slots=True)
class Row:
    """An attention, by the name that users write."""

    name: str
    summary: str
    backend: str | None = None
    """Its name in the dispatcher of diffusers; None leaves the model as it is."""
    package: str = ""
    """What Python imports of it."""
    install: str = ""
    """How that package is installed."""
    devices: tuple[str, ...] = ()
    """Types of device that it runs on; nothing is all."""
    takes_mask: bool = True
    """Whether it can hide padding."""
    has_gradients: bool = True
    """Whether its own backward pass, if it has one, gives the gradients of what it computes."""


CUDA = ("cuda",)
FLASH, FLASH_3 = "pip install flash-attn --no-build-isolation", "Build it from the folder hopper of github.com/Dao-AILab/flash-attention."
KERNELS = 'pip install "kernels>=0.12"'
SAGE = "pip install sageattention"
ATTENTIONS = [
    Row("diffusers", "PyTorch's own attention, which takes the fastest of its kernels that fits."),
    Row("native", "The same."),
    Row("native-math", "PyTorch's plain formula: slow, holds all scores, the same everywhere.", "_native_math"),
    Row("native-flash", "PyTorch's FlashAttention and nothing else.", "_native_flash", takes_mask=False),
    Row("native-efficient", "PyTorch's memory-efficient kernel and nothing else.", "_native_efficient", devices=CUDA),
    Row("cudnn", "cuDNN's kernel, through PyTorch.", "_native_cudnn", devices=CUDA),
    Row("flex", "PyTorch's flex attention, not compiled: to try it out, slow.", "flex", devices=CUDA),
    Row("xformers", "The kernels of xFormers.", "xformers", "xformers", "pip install xformers", CUDA),
    Row("flash-attn", "FlashAttention-2, from its package.", "flash", "flash_attn", FLASH, CUDA, takes_mask=False),
    Row("flash-attn-2", "The same.", "flash", "flash_attn", FLASH, CUDA, takes_mask=False),
    Row("flash-attn-hub", "FlashAttention-2, a kernel from the hub.", "flash_hub", "kernels", KERNELS, CUDA, takes_mask=False),
    Row("flash-attn-varlen-hub", "The same for texts of several lengths.", "flash_varlen_hub", "kernels", KERNELS, CUDA),
    Row("flash-attn-3", "FlashAttention-3, for Hopper.", "_flash_3", "flash_attn_interface", FLASH_3, CUDA, takes_mask=False),
    Row("flash-attn-3-varlen", "The same for texts of several lengths.", "_flash_varlen_3", "flash_attn_interface", FLASH_3, CUDA),
    Row("flash-attn-3-hub", "FlashAttention-3, a kernel from the hub.", "_flash_3_hub", "kernels", KERNELS, CUDA, takes_mask=False),
    Row("flash-attn-3-varlen-hub", "The same for texts of several lengths.", "_flash_3_varlen_hub", "kernels", KERNELS, CUDA),
    Row("flash-attn-4-hub", "FlashAttention-4, a kernel from the hub.", "flash_4_hub", "kernels", KERNELS, CUDA, takes_mask=False),
    Row("sageattention", "8-bit attention, the kernel that fits the GPU.", "sage", "sageattention", SAGE, CUDA, False, False),
    Row(
        "sageattention-int8-fp16-triton",
        "8-bit scores, 16-bit values, in Triton.",
        "_sage_qk_int8_pv_fp16_triton",
        "sageattention",
        SAGE,
        CUDA,
        False,
        False,
    ),
    Row(
        "sageattention-int8-fp16-cuda",
        "8-bit scores, 16-bit values, in CUDA.",
        "_sage_qk_int8_pv_fp16_cuda",
        "sageattention",
        SAGE,
        CUDA,
        False,
        False,
    ),
    Row("sageattention-int8-fp8-cuda", "8-bit scores and values, in CUDA.", "_sage_qk_int8_pv_fp8_cuda", "sageattention", SAGE, CUDA, False, False),
    Row("native-npu", "The kernel of Ascend NPUs.", "_native_npu", "torch_npu", "pip install torch_npu", ("npu",)),
    Row("native-xla", "The kernel of TPUs.", "_native_xla", "torch_xla", "pip install torch_xla", ("xla",), takes_mask=False),
]


def find(name: str) -> Row:
    """Give the row of that name.

    Raises:
        ConfigError: no such attention.
    """
    rows = {row.name: row for row in ATTENTIONS}
    if name not in rows:
        raise ConfigError(f"attention_mechanism {name!r} is unknown", hint=choose(name, rows, "attentions"))
    return rows[name]


def check(row: Row, device: str, masked: str | None = None) -> None:
    """Refuse what cannot run here, as far as that is known without trying.

    Args:
        device: its type, such as "cuda".
        masked: the family's name if it hides padding from its attention.

    Raises:
        ConfigError: says what is missing, and which names do work here.
    """
    problem, remedy = _problem(row, device, masked)
    if problem:
        usable = ", ".join(works_here(device, masked))
        raise ConfigError(f"attention_mechanism {row.name} {problem}", hint=" ".join(filter(None, [remedy, f"Here these work: {usable}."])))


def works_here(device: str, masked: str | None = None) -> Sequence[str]:
    """The names of those that are not known to fail."""
    return [row.name for row in ATTENTIONS if not _problem(row, device, masked)[0]]


def _problem(row: Row, device: str, masked: str | None) -> tuple[str, str]:
    """What is wrong, as the rest of a sentence, and what to do about it; two empty texts if nothing is."""
    if row.devices and device not in row.devices:
        return f"needs a device of type {' or '.join(row.devices)}; this machine trains on {device}", ""
    if row.package and importlib.util.find_spec(row.package) is None:
        return f"needs the package {row.package}, which is not installed", row.install if row.install.endswith(".") else f"{row.install}."
    if masked and not row.takes_mask:
        return f"cannot hide padding, and {masked} must", ""
    return "", ""
