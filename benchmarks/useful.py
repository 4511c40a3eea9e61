"""How much of what a device computes is of use: floating-point operations that a step needs, and the rate at which products run here.

Needed are the forward pass, the gradients to inputs of frozen layers, of attention, and of adapters to both; nothing that is computed again, and
no gradient that nobody asks for. An addition and a multiplication are two operations.

Letters: B batch, C latent channels, h w latent pixels, N tokens, I inputs and O outputs of a layer, H heads, D width.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks import bare
from benchmarks.networks import empty

WARM_UPS, REPEATS = 3, 10
MOST_SHAPES = 8
"""Distinct products of a model that are timed, those with the most operations."""


@dataclass
class Work:
    """Operations of one step."""

    forward: int = 0
    backward: int = 0
    adapters: int = 0
    """Of both passes."""
    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    """Operations of frozen linear layers, by N, I and O, both passes together."""
    convolutions: Counter[tuple[tuple[int, ...], tuple[int, ...], Any, Any, bool]] = field(default_factory=Counter)
    """Calls of frozen convolutions, by the shapes of input and weight, stride, padding, and whether the input gets a gradient."""
    attentions: Counter[tuple[tuple[int, ...], int]] = field(default_factory=Counter)
    """Calls of attention, by the shape of the queries (B, H, N, D) and the number of keys."""

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.adapters


class _Attention(TorchFunctionMode):
    """Counts calls of PyTorch's attention: two products on the way there, and four on the way back."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            given = [*arguments, *(value for value in (named or {}).values() if isinstance(value, Tensor))]
            query, key, value = given[:3]
            operations = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            self._work.attentions[tuple(query.shape), key.shape[-2]] += 1
            self._work.forward += operations
            self._work.backward += 2 * operations if any(one.requires_grad for one in (query, key, value)) else 0
        return function(*arguments, **(named or {}))


def needed(model: str, size: str, adapter: str, number: int, latents: Sequence[int], tokens: int) -> Work:
    """Count a step by the shapes of its layers, without numbers.

    Args:
        number: the factor of a lokr, the rank of a lora.
        latents: their shape, (B, C, h, w).
        tokens: of a prompt.
    """
    meta = torch.device("meta")
    network = empty(model, size).to(meta)
    work, feed = Work(), meta_feed(model, network, latents, tokens)
    adapters = bare.adapt(model, network, adapter, number, meta)
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(_count(work))
    for one in adapters:
        _count_adapter(one, work)
    with _Attention(work), torch.device(meta):
        bare.denoise(model, network, feed.latents, torch.zeros(latents[0]), feed)
    return work


def meta_feed(model: str, network: Any, latents: Sequence[int], tokens: int) -> bare.Feed:
    """A batch of nothing but shapes, on the device of the network."""
    config, device = network.config, next(network.parameters()).device
    width = config.cross_attention_dim if model == "sdxl" else config.joint_attention_dim
    pooled = config.get("pooled_projection_dim") or 0
    if model == "sdxl":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    text = {"prompt": torch.zeros(latents[0], tokens, width), **({"pooled": torch.zeros(latents[0], pooled)} if pooled else {})}
    return bare.feed_of(torch.zeros(*latents), text, device, torch.float32)


def _count(work: Work) -> Callable[[nn.Module, Any, Any], None]:
    def hook(layer: nn.Module, given: Any, answer: Tensor) -> None:
        operations = 2 * answer.numel() * (layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else given[0].shape[-1])
        back = operations if given[0].requires_grad else 0
        work.forward += operations
        work.backward += back
        if isinstance(layer, nn.Conv2d):
            work.convolutions[tuple(given[0].shape), tuple(layer.weight.shape), layer.stride, layer.padding, given[0].requires_grad] += 1
        else:
            work.products[given[0].shape[:-1].numel(), given[0].shape[-1], answer.shape[-1]] += operations + back

    return hook


def _count_adapter(adapter: nn.Module, work: Work) -> None:
    """Adapters take the place of a layer's `forward`, so their own is watched."""
    inner = adapter.forward

    def watched(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if isinstance(adapter, bare.LoKr):
            (o1, i1), (o2, i2) = adapter.w1.shape, adapter.w2.shape
            first, second = min((i1 * i2 * o2, i1 * o1 * o2), (o1 * i1 * i2, o1 * i2 * o2), key=sum)
        else:
            first, second = (parameter.numel() for parameter in adapter.parameters())
        work.adapters += 2 * rows * (first * (3 if x.requires_grad else 2) + second * 3)
        return inner(x)  # type: ignore[no-any-return]

    for layer in (cell.__self__ for cell in adapter.base):  # type: ignore[union-attr]
        layer.forward = watched


def rates(work: Work, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Operations a second of products on random numbers: of large squares, and of the shapes of this work, both passes.

    The second is the mean by time of the largest shapes; it is the ceiling of what the layers alone could reach.
    """
    side = 8192 if device.type == "cuda" else 1024
    square = 2 * side**3 / _seconds_of(side, side, side, device, dtype)
    found, operations, seconds = [], 0.0, 0.0
    for (rows, inputs, outputs), total in work.products.most_common(MOST_SHAPES):
        forward = 2 * rows * inputs * outputs / _seconds_of(rows, inputs, outputs, device, dtype)
        backward = 2 * rows * inputs * outputs / _seconds_of(rows, outputs, inputs, device, dtype)
        found.append({"rows": rows, "inputs": inputs, "outputs": outputs, "share": total / work.total, "forward": forward, "backward": backward})
        operations, seconds = operations + total, seconds + total / 2 / forward + total / 2 / backward
    return {"square": square, "own_shapes": operations / seconds if seconds else square, "shapes": found}


def _seconds_of(rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> float:
    """The median time of a product (rows, inputs) by (outputs, inputs) transposed."""
    left, right = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs)))
    answer = torch.empty(rows, outputs, device=device, dtype=dtype)
    for _ in range(WARM_UPS):
        torch.mm(left, right.T, out=answer)
    if device.type != "cuda":
        taken = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            torch.mm(left, right.T, out=answer)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        torch.mm(left, right.T, out=answer)
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(second) for first, second in itertools.pairwise(marks)) / 1e3
