"""Which layers of a base in 8 bits are faster as 8-bit products than as products with the weight made plain first.

Rounding a token costs the same whether a layer is wide or narrow, and so narrow layers may gain nothing.

Letters: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from simpletuner.memory.quantisers.eight_bit import FEWEST_TOKENS, EightBit, EightBitLinear, plain, turned
from simpletuner.memory.timing import Stopwatch, TimingBook, Work

WRAPPED = ".base_layer"
"""What PEFT adds to the name of a layer that it adapts."""


@dataclass(frozen=True, slots=True)
class Product:
    """The products of layers that are alike."""

    outputs: int
    inputs: int
    tokens: int
    """Rounded, so that sizes which are nearly the same are timed once."""
    weights: str
    """The kind, as `EightBit` knows it."""

    def __str__(self) -> str:
        return f"{self.weights}, {self.inputs} to {self.outputs}, {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a product and of the gradient to its inputs."""

    eight_bit: float
    on_the_fly: float
    """With a plain weight, which is made for each of the two."""
    plain: float
    """With a weight that is held plain."""

    @property
    def wins(self) -> bool:
        """Whether 8 bits are faster."""
        return self.eight_bit < self.on_the_fly


def eight_bit_layers(network: nn.Module) -> dict[str, EightBitLinear]:
    """Those of a network, by the names that they have without an adapter."""
    return {name.replace(WRAPPED, ""): layer for name, layer in network.named_modules() if isinstance(layer, EightBitLinear)}


def products_of(layers: Mapping[str, EightBitLinear], tokens: Mapping[str, int]) -> dict[str, Product]:
    """The product of each layer; none of those that few tokens come to, or nobody knows how many: these have nothing to choose.

    Args:
        tokens: that come to each layer at once, by its name.
    """
    return {
        name: Product(layer.out_features, layer.in_features, rounded(tokens[name]), weights_of(layer))
        for name, layer in layers.items()
        if tokens.get(name, 0) >= FEWEST_TOKENS
    }


def rounded(tokens: int) -> int:
    """The largest power of two that is no more, and enough for a product in 8 bits."""
    return max(1 << (tokens.bit_length() - 1), 1 << FEWEST_TOKENS.bit_length())


def weights_of(layer: EightBitLinear) -> str:
    return str(layer.kind).removeprefix("torch.") + (" rotated" if layer.turn is not None else "")


def time_products(products: Iterable[Product], dtype: torch.dtype, book: TimingBook, stopwatch: Stopwatch) -> dict[Product, Timed | None]:
    """Time what the book does not tell, those first that most is computed in; None is what no time was left for, which the next start times.

    Args:
        products: of all layers, as often as there are such layers.
        dtype: of inputs and answers.
    """
    counts = Counter(products)
    kinds = sorted(counts, key=lambda one: (-counts[one] * one.outputs * one.inputs * one.tokens, str(one)))
    expected = {field.name for field in fields(Timed)}
    found: dict[Product, Timed | None] = {}
    for kind in kinds:
        row = book.rows.get(str(kind)) or {}
        if row.keys() != expected and not stopwatch.is_over:  # unknown, or of another release of ours
            row = book.rows[str(kind)] = asdict(time_product(kind, dtype, stopwatch))
        found[kind] = Timed(**row) if row.keys() == expected else None
    return found


def time_product(product: Product, dtype: torch.dtype, stopwatch: Stopwatch) -> Timed:
    """Time one product on random numbers.

    All that is computed by tokens takes twice the time with twice the tokens; only making a weight plain does not depend on them. A slow machine
    is therefore asked with fewer.
    """
    device = stopwatch.device
    generator = torch.Generator(device).manual_seed(0)  # the run's own is left alone
    linear = nn.Linear(product.inputs, product.outputs, bias=False, device="meta", dtype=dtype).to_empty(device=device).requires_grad_(False)
    column, row = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in (product.outputs, product.inputs))
    torch.outer(column, row, out=linear.weight)  # so many numbers at random would take longer than the products
    layer = EightBit(product.weights).quantise(linear)
    assert isinstance(layer, EightBitLinear)
    turn = layer.turn

    def passes(forward: nn.Module, rows: int) -> Work:
        x, direction = (torch.randn(rows, size, generator=generator, device=device, dtype=dtype) for size in (product.inputs, product.outputs))
        x.requires_grad_()
        return lambda: torch.autograd.grad(forward(x), x, direction)

    rows = stopwatch.rows(lambda count: passes(linear, count), product.tokens)
    ways = {"eight_bit": passes(layer, rows), "plain": passes(linear, rows), "unpack": lambda: plain(layer.weight.view(layer.kind), layer.scale)}
    if turn is not None:  # inputs are turned in either way, and gradients back
        inputs = torch.randn(rows, product.inputs, generator=generator, device=device, dtype=dtype)
        ways["turn"] = lambda: _turned_twice(inputs, turn)
    seconds, more = stopwatch.compare(ways), product.tokens / rows
    return Timed(
        eight_bit=seconds["eight_bit"] * more,
        on_the_fly=(seconds["plain"] + seconds.get("turn", 0.0)) * more + 2 * seconds["unpack"],
        plain=seconds["plain"] * more,
    )


def _turned_twice(inputs: Tensor, turn: Tensor) -> Tensor:
    return turned(turned(inputs, turn), turn)
