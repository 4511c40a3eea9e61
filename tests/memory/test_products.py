"""Which layers multiply in 8 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from simpletuner.memory.products import Product, Timed, eight_bit_layers, products_of, rounded, time_product, time_products
from simpletuner.memory.quantisers.eight_bit import FEWEST_TOKENS, EightBit, EightBitLinear
from simpletuner.memory.timing import Stopwatch, TimingBook

CPU = torch.device("cpu")
SMALL, LARGE = Product(32, 64, 32, "int8"), Product(128, 64, 64, "int8 rotated")


def layer(inputs: int = 64, outputs: int = 32, kind: str = "int8") -> EightBitLinear:
    quantised = EightBit(kind).quantise(nn.Linear(inputs, outputs).bfloat16().requires_grad_(False))
    assert isinstance(quantised, EightBitLinear)
    return quantised


@given(st.integers(FEWEST_TOKENS, 1_000_000))
def test_tokens_are_rounded_to_a_power_of_two_that_8_bits_can_multiply(tokens):
    found = rounded(tokens)

    assert found.bit_count() == 1 and found >= FEWEST_TOKENS and tokens / 2 < found < 2 * tokens


def test_layers_that_few_tokens_come_to_have_nothing_to_choose():
    layers = {"block.0": layer(), "block.1": layer(kind="int8 rotated"), "time": layer(), "unused": layer()}

    found = products_of(layers, {"block.0": 1090, "block.1": 77, "time": 2, "plain": 1090})

    assert found == {"block.0": Product(32, 64, 1024, "int8"), "block.1": Product(32, 64, 64, "int8 rotated")}


def test_layers_have_the_names_of_the_bare_network_below_an_adapter_too():
    wrapped = nn.Module()
    wrapped.base_layer = layer()

    found = eight_bit_layers(nn.ModuleDict({"to_q": wrapped, "to_k": layer(), "norm": nn.Linear(4, 4)}))

    assert set(found) == {"to_q", "to_k"}


@pytest.mark.parametrize("kind", ["int8", "int8 rotated", "float8_e4m3fn"])
def test_each_kind_is_timed_and_the_run_draws_the_same_numbers_after_it(kind):
    before = torch.get_rng_state()

    found = time_product(Product(64, 128, 256, kind), torch.bfloat16, Stopwatch(CPU, 0.05))

    assert found.eight_bit > 0 and 0 < found.plain < found.on_the_fly
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_known_is_not_timed_again_and_what_no_time_was_left_for_is_timed_next(tmp_path):
    book = TimingBook(tmp_path, CPU, torch.bfloat16)
    first = time_products([SMALL, LARGE, SMALL], torch.bfloat16, book, Stopwatch(CPU, 5))
    book.save()
    known = TimingBook(tmp_path, CPU, torch.bfloat16)

    again = time_products([SMALL, LARGE], torch.bfloat16, known, Stopwatch(CPU, 5))

    assert again == first and None not in first.values()
    other = Product(64, 64, 32, "int8")
    assert time_products([SMALL, other], torch.bfloat16, known, Stopwatch(CPU, 0)) == {SMALL: first[SMALL], other: None}
    assert time_products([other], torch.bfloat16, known, Stopwatch(CPU, 5))[other] is not None


def test_a_row_of_another_form_is_timed_anew(tmp_path):
    book = TimingBook(tmp_path, CPU, torch.bfloat16)
    book.rows[str(SMALL)] = {"another way": 1.0}

    found = time_products([SMALL], torch.bfloat16, book, Stopwatch(CPU, 5))[SMALL]

    assert isinstance(found, Timed) and book.rows[str(SMALL)] == {"eight_bit": found.eight_bit, "on_the_fly": found.on_the_fly, "plain": found.plain}


def test_what_most_is_computed_in_is_timed_first(tmp_path):
    book = TimingBook(tmp_path, CPU, torch.bfloat16)

    time_products([LARGE, *[SMALL] * 9], torch.bfloat16, book, Stopwatch(CPU, 5))

    assert list(book.rows) == [str(SMALL), str(LARGE)]  # 9 x 32 x 64 x 32 against 128 x 64 x 64
