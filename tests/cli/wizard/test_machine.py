"""What the look at this machine said, and a plan."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from simpletuner.cli.wizard.forecast import Outcome, read
from simpletuner.cli.wizard.machine import Card, Machine, cards_of, machine_with


def test_cards_are_read_behind_whatever_libraries_print():
    said = 'a warning\n[["H200", 150000000000, 140000000000, true], ["T4", 16000000000, 16000000000, false]]\n'

    machine = Machine(cards_of(said))

    assert machine.card == Card("T4", 16 * 10**9, 16 * 10**9, has_bf16=False)
    assert "H200, 150 GB" in str(machine)


@given(st.text())
def test_a_look_that_failed_finds_no_cards(said):
    assert cards_of(said + "\nTraceback") == ()


def test_a_machine_without_cards_says_so():
    assert str(machine_with(())).startswith("no card that PyTorch can use; ")


def test_a_plan_is_read_with_what_cuda_takes_and_the_changes_that_make_it_fit():
    phases = [{"name": "text", "vram_bytes": 3e9, "ram_bytes": 1e9}, {"name": "step", "vram_bytes": 9e9, "ram_bytes": 1e9}]
    fit = {"fits": True, "changes": [{"settings": {"blocks_to_swap": 9}, "time_factor": 1.2, "rule": "slower"}]}
    said = json.dumps({"phases": phases, "peak_vram_bytes": 9e9, "peak_ram_bytes": 1e9, "cuda_bytes": 6e8, "fit": fit})

    outcome = read(said, "")

    assert isinstance(outcome, Outcome) and outcome.settings == {"blocks_to_swap": 9}
    assert outcome.described(int(12e9)) == "fits: 9.6 of 12.0 GB of the card (step), 1.0 GB of main memory"
    assert outcome.described(int(8e9)).startswith("DOES NOT FIT")
    assert read("", "planning\nerror: no such model\n  hint: x") == "error: no such model"
