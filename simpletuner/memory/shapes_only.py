"""Tensors without numbers: whatever is computed meanwhile has shapes, dtypes and the memory that it would take, and takes none.

They stand on PyTorch's meta device. What an operation answers follows from the shapes that it is given, so it is asked once for each of them,
and its answer is remembered: PyTorch's own way to it takes ten times as long. Networks ask a few small whole numbers of their input, such as
how many tokens a mask hides; these numbers, and what follows from them alone, are real, so that such questions have an answer.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.memory.parts import bytes_of, made_of, parts_of
from simpletuner.memory.quantisers.quantiser import Quantiser
from simpletuner.memory.tracker import Tracker, tensors_in

REAL_DTYPES = (torch.bool, torch.int32, torch.int64)
"""Of what counts, and not of weights in few bits."""
LARGEST_REAL = 50_000
"""Numbers in a tensor whose values are still computed: of tokens, and not of pairs of them."""
META, CPU = torch.device("meta"), torch.device("cpu")
NUMBERS_DECIDE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@contextmanager
def shapes_only() -> Iterator[None]:
    """Have tensors without numbers made meanwhile, whatever device is asked for."""
    with _Shapes(), _fused_attention():
        yield


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Have PyTorch's attention hold no scores where a card or a CPU has kernels for that: on the meta device it takes the plain formula."""
    plain = functional.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        is_fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
        if not is_fused or dropout_p or query.dim() != 4 or query.shape[-1] != value.shape[-1]:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return found

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an operation gives for certain shapes."""

    made: Any
    """Its results in their form, with shape, stride and dtype in place of each tensor."""
    is_real: bool
    """Whether its numbers are to be computed: they count something, and follow from such numbers alone."""


@dataclass(frozen=True, slots=True)
class _New:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Shapes(TorchDispatchMode):
    """Answers in place of PyTorch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[Any, dict[Any, _Answer]] = {}
        """Of each operation, what it is given to what it answers."""
        self._numbers: dict[int, Any] = {}
        """Of tensors that were made of a single number, by the address of their storage."""
        self._ways: dict[Any, Callable[..., Any]] = {}
        """How each operation is answered."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled meanwhile; what would see to that takes longer than all this

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if types and any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of others: it first says what it does with those
        way = self._ways.get(function)
        if way is None:
            way = self._ways[function] = self._way(function)
        return way(function, arguments, named or {})

    def _way(self, function: Any) -> Callable[..., Any]:
        special = {
            torch.ops.aten._local_scalar_dense.default: self._number,
            torch.ops.aten._unsafe_view.default: _by_itself,  # which says nothing of it
            torch.ops.aten._to_copy.default: self._copied,
            torch.ops.aten.lift_fresh.default: self._lifted,
        }
        if function in special:
            return special[function]
        results, arguments = function._schema.returns, function._schema.arguments
        written = [argument for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
        if written:
            return self._written if written == arguments[:1] and len(results) == 1 else _by_itself
        if any(result.alias_info is not None for result in results) or not results:
            return _by_itself  # a view
        return self._from_numbers if NUMBERS_DECIDE & set(function.tags) else self._new

    # Ways to an answer.

    def _new(self, function: Any, arguments: Any, named: Any) -> Any:
        answer = self._answer(function, arguments, named)
        return function(*arguments, **_put(named, CPU)) if answer.is_real else self._made(answer.made)

    def _written(self, function: Any, arguments: Any, named: Any) -> Any:
        if self._answer(function, arguments, named).is_real:
            function(*arguments, **named)
        return arguments[0]

    def _copied(self, function: Any, arguments: Any, named: Any) -> Any:
        (tensor,) = arguments
        moves_alone = named.get("device") is not None and named.get("dtype", tensor.dtype) == tensor.dtype and named.get("memory_format") is None
        if moves_alone and (tensor.is_meta or tensor.dtype in REAL_DTYPES):
            return torch.ops.aten.alias.default(tensor)  # it is on that device, whichever it is
        return self._new(function, arguments, named)

    def _lifted(self, function: Any, arguments: Any, named: Any) -> Any:
        (tensor,) = arguments
        if tensor.is_meta or _is_counting(tensor):
            return tensor
        made = _on_meta(_New(tensor.shape, tensor.stride(), tensor.dtype))
        if tensor.numel() == 1:
            storage = made.untyped_storage()
            self._numbers[storage._cdata] = tensor.item()
            weakref.finalize(storage, self._numbers.pop, storage._cdata).atexit = False
        return made

    def _number(self, function: Any, arguments: Any, named: Any) -> Any:
        (tensor,) = arguments
        address = tensor.untyped_storage()._cdata
        return self._numbers[address] if address in self._numbers else function(tensor)

    def _from_numbers(self, function: Any, arguments: Any, named: Any) -> Any:
        found = function(*arguments, **named)  # says itself that it cannot, where there are none
        return self._made(_described(found)) if any(not _is_counting(tensor) for tensor in tensors_in(found)) else found

    # Small things.

    def _answer(self, function: Any, arguments: Any, named: Any) -> _Answer:
        known = self._answers.get(function)
        if known is None:
            known = self._answers[function] = {}
        key = (_key(arguments), _key(tuple(named.items()))) if named else _key(arguments)
        answer = known.get(key)
        if answer is None:
            answer = known[key] = _ask(function, arguments, named)
        return answer

    def _made(self, made: Any) -> Any:
        if type(made) is _New:
            return _on_meta(made)
        return type(made)(map(self._made, made)) if isinstance(made, (list, tuple)) else made


def _by_itself(function: Any, arguments: Any, named: Any) -> Any:
    return function(*arguments, **named)


def _ask(function: Any, arguments: Any, named: Any) -> _Answer:
    given = list(tensors_in((arguments, named)))
    results = function(*_shapes(arguments), **_put(_shapes(named) if given else {**named, "device": META}, META))
    made = list(tensors_in(results))
    is_real = bool(made) and all(map(_is_counting, made)) and not any(tensor.is_meta for tensor in given)
    return _Answer(_described(results), is_real and torch.Tag.nondeterministic_seeded not in function.tags)


def _key(value: Any) -> Any:
    """What tells apart values that an operation may answer differently."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple([_key(one) for one in value])
    return type(value), value  # 1, 1.0 and True are equal


def _shapes(value: Any) -> Any:
    """The same with tensors on the meta device in place of all."""
    if isinstance(value, Tensor):
        return _on_meta(_New(value.shape, value.stride(), value.dtype))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_shapes, value))
    return {name: _shapes(one) for name, one in value.items()} if isinstance(value, dict) else value


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _New(value.shape, value.stride(), value.dtype)
    return type(value)(map(_described, value)) if isinstance(value, (list, tuple)) else value


def _put(named: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments with another device, if they name one, and nothing that goes with a device alone."""
    return {**named, **{name: value for name, value in (("device", device), ("pin_memory", False), ("generator", None)) if name in named}}


def _is_counting(tensor: Tensor) -> bool:
    return tensor.dtype in REAL_DTYPES and tensor.numel() <= LARGEST_REAL


def _on_meta(new: _New) -> Tensor:
    return torch.empty_strided(new.shape, new.stride, dtype=new.dtype, device=META)


class Twins(Quantiser):
    """Has a library quantise one layer of each kind, without numbers, and copies it for the others."""

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__("as first made")
        self._quantiser = quantiser
        self._first: dict[Any, tuple[nn.Module, int]] = {}
        self.work: dict[nn.Module, int] = {}
        """Bytes that were there for a layer besides what it became: it itself, and what the library made of it on the way."""

    def quantise(self, layer: nn.Linear) -> nn.Module:
        kind = (layer.weight.shape, layer.weight.dtype, layer.bias is None)
        if kind in self._first:
            quantised = _twin(self._first[kind][0])
        else:
            before = layer.weight.nbytes
            with Tracker() as tracker:
                quantised = self._quantiser.quantise(layer)
            self._first[kind] = quantised, before + tracker.peak - bytes_of(cast(Tensor, quantised.weight))
        self.work[quantised] = self._first[kind][1]
        return quantised

    def beyond(self, network: nn.Module) -> int:
        """Bytes that loading a network takes at most beyond those that it has in the end, if its layers come in their order."""
        there = most = 0
        for module in network.modules():
            there += sum(map(bytes_of, module.parameters(recurse=False)))
            most = max(most, there + self.work.get(module, 0))
        return most - there

    def pack(self, layer: nn.Module) -> Any:
        raise NotImplementedError

    def unpack(self, layer: nn.Linear, tensors: Any, note: str) -> nn.Module:
        raise NotImplementedError


def _twin(layer: nn.Module) -> nn.Module:
    weights = {id(weight): made_of(weight, [part.clone() for part in parts_of(weight)]) for weight in layer.parameters()}
    twin: nn.Module = copy.deepcopy(layer, weights)
    return twin


class StandIn(Quantiser):
    """Takes the place of a library that is not installed, or cannot work on shapes: weights of so many bits, and the time of a layer's product."""

    def __init__(self, bits: float) -> None:
        super().__init__(f"{bits} bits")
        self._bits = bits

    def quantise(self, layer: nn.Linear) -> nn.Module:
        return _Packed(layer, self._bits)

    def pack(self, layer: nn.Module) -> Any:
        raise NotImplementedError

    def unpack(self, layer: nn.Linear, tensors: Any, note: str) -> nn.Module:
        raise NotImplementedError


class _Packed(nn.Linear):
    """A layer whose weight is bytes, of which it makes the plain weight when it multiplies, and once more on the way back."""

    def __init__(self, layer: nn.Linear, bits: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = torch.empty(int(layer.weight.numel() * bits / 8), 1, dtype=torch.uint8)  # a matrix, as a weight that can be streamed is
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.weight, self.bias, self.out_features)
        return product


class _Product(torch.autograd.Function):
    """x W^T + b with a gradient by x (..., I) alone: g W."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.inputs = input.shape[-1]
        plain = torch.empty(outputs, input.shape[-1], dtype=input.dtype)  # (O, I)
        return nn.functional.linear(input, plain, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        plain = torch.empty(gradient.shape[-1], ctx.inputs, dtype=gradient.dtype)  # (O, I)
        return gradient @ plain, None, None, None
