"""Have the attention of any model of diffusers computed by one of the library's back-ends, whether its layers know of those or not.

Letters: B batch, T tokens, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Compute = Callable[..., Tensor]
"""Called as `torch.nn.functional.scaled_dot_product_attention` is."""


class Switch:
    """What the attention layers of a denoiser compute with; None is what they would without it.

    The library's own `set_attention_backend` reaches only the newer of its models, and sets every other model's back-end along with it.
    """

    def __init__(self, compute: Compute | None = None) -> None:
        self.compute = compute

    def attach(self, denoiser: nn.Module) -> None:
        for module in denoiser.modules():
            if hasattr(module, "processor"):
                module.forward = self._switched(module.forward)

    def _switched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def computed(*arguments: Any, **named: Any) -> Any:
            if self.compute is None:
                return forward(*arguments, **named)
            with _InPlaceOfPyTorch(self.compute):
                return forward(*arguments, **named)

        return computed

    @contextmanager
    def set_to(self, compute: Compute | None) -> Iterator[None]:
        """Compute with another while the body runs."""
        before, self.compute = self.compute, compute
        try:
            yield
        finally:
            self.compute = before


class _InPlaceOfPyTorch(TorchFunctionMode):
    """Computes what asks for PyTorch's attention by other means; in there it does not apply."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self._compute = compute

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        chosen = self._compute if function is F.scaled_dot_product_attention else function
        return chosen(*arguments, **(named or {}))


def dispatched(backend: str) -> Compute:
    """A back-end of diffusers, by its name there, called as PyTorch's attention is.

    Raises:
        RuntimeError, ValueError: the library lacks it, or what it needs.
    """
    from diffusers import attention_backend
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    with attention_backend(backend):
        known = AttentionBackendName(backend)  # entering has checked what it needs, and fetched kernels that are on the hub

    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, H, T, D) to (B, T, H, D)
        answer = dispatch_attention_fn(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=known)
        return answer.transpose(1, 2)  # (B, H, T, D)

    return compute


def with_exact_gradients(compute: Compute) -> Compute:
    """The same answers, with the gradients of PyTorch's attention at the same inputs: for kernels without right gradients of their own."""

    def exact(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: Any) -> Tensor:
        answer: Tensor = _ExactGradients.apply(query, key, value, attn_mask, compute, named)
        return answer

    return exact


class _ExactGradients(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, compute: Compute, named: Any) -> Tensor:
        context.save_for_backward(query, key, value, mask)
        context.named = named
        return compute(query, key, value, mask, **named)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        *saved, mask = context.saved_tensors
        with torch.enable_grad():
            query, key, value = inputs = [tensor.detach().requires_grad_() for tensor in saved]
            answer = F.scaled_dot_product_attention(query, key, value, mask, **context.named)
            found = torch.autograd.grad(answer, inputs, gradients[0])
        return (*found, None, None, None)


def try_out(compute: Compute, device: torch.device, dtype: torch.dtype, *, trains: bool) -> None:
    """Compute a small attention there and, if it is to be trained with, its gradients.

    Raises:
        Exception: whatever the kernel has to say.
    """
    shape = (1, 2, 64, 64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        query, key, value = (torch.randn(*shape, device=device, dtype=dtype, requires_grad=trains) for _ in range(3))
        answer = compute(query, key, value)
        if trains:
            answer.float().sum().backward()
    if trains and query.grad is None:
        raise RuntimeError("it has no gradients")
