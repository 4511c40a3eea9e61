"""The benchmarks' own arithmetic: turns, ratios, results that are kept, and operations counted in two ways."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bare, book, cases, networks, useful
from benchmarks.book import Book
from benchmarks.harness import Contender, Turns, figures, ratio, take_turns
from benchmarks.page import page

CPU = torch.device("cpu")


@pytest.mark.parametrize("adapter", ["lokr", "lora"])
@pytest.mark.parametrize("model", cases.MODELS)
def test_the_operations_of_a_step_are_those_that_pytorch_counts(model, adapter):
    shape = (2, 16 if model == "flux" else 4, 8, 16)
    network = networks.random_network(model, "tiny", CPU, torch.float32)
    feed = useful.meta_feed(model, network, shape, 24)
    bare.adapt(model, network, adapter, 4, CPU)

    work = useful.needed(model, "tiny", adapter, 4, shape, 24)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        bare.passes(model, network, feed, bare.alpha_bars_on(CPU), torch.float32).backward()

    assert feed.latents.device == CPU
    if adapter == "lora":
        assert work.total == counted.get_total_flops()
    else:  # of the two orders in which a LoKr can be computed, the cheaper one is what is needed
        assert 0.93 * counted.get_total_flops() < work.total <= counted.get_total_flops()


@pytest.mark.parametrize("model", cases.MODELS)
def test_the_sizes_are_what_they_are_called(model):
    found = {size: sum(parameter.numel() for parameter in networks.empty(model, size).parameters()) / 1e6 for size in cases.SIZES}

    assert found["tiny"] < 1 and 45 < found["medium"] < 55
    assert found["real"] == pytest.approx({"auraflow": 6858.6, "sdxl": 2567.5, "flux": 11901.4}[model], rel=1e-4)


def test_a_twin_has_the_same_weights_and_adapters_of_its_own():
    network = networks.random_network("flux", "tiny", CPU, torch.float32)
    other = networks.twin(network)

    bare.adapt("flux", other, "lokr", 4, CPU)

    assert all(one is another for one, another in zip(network.parameters(), other.parameters()))
    first, second = (networks.layers_of(one, suffixes=("to_q",)) for one in (network, other))
    assert all("forward" not in layer.__dict__ for layer in first.values()) and all("forward" in layer.__dict__ for layer in second.values())


def test_turns_are_taken_in_an_order_that_is_turned_around():
    taken: list[str] = []
    contenders = [Contender(name, lambda name=name: taken.append(name)) for name in ("a", "b")]

    found = take_turns(contenders, 2, 2, CPU)

    assert "".join(taken) == "aabb" + "bbaa" + "aabb"
    assert all([len(steps) for steps in turns.rounds] == [2, 2] for turns in found.values())


def test_ratios_are_of_rounds_and_figures_of_steps():
    ours, theirs = Turns(rounds=[[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]], wall=[2.0, 4.0, 8.0]), Turns(rounds=[[2.0], [2.0], [2.0]])

    assert ratio(theirs, ours) == {"median": 1.0, "least": 0.5, "most": 2.0}
    assert figures(ours)["seconds"] == 2.0 and figures(ours)["extremes"] == [1.0, 4.0] and figures(ours)["wall_seconds"] == 2.0


def test_a_case_is_measured_once_for_the_same_sources_and_given_up_when_it_ends_its_process(tmp_path, monkeypatch):
    results = Book.of(tmp_path, "NVIDIA H200 (SXM)")

    assert results.path.name == "nvidia-h200-sxm.json"
    assert results.begin("a") and not results.is_done("a")
    results.write("a", {"kind": "speed"}, {"device": "x"})
    assert results.is_done("a") and results.read()["machine"] == {"device": "x"}
    assert results.begin("b") and results.begin("b") and not results.begin("b")
    assert "2 times" in results.read()["cases"]["b"]["left_out"]
    monkeypatch.setattr(book, "sources", lambda: "others")
    assert not results.is_done("a") and results.begin("b")


def test_cases_have_names_of_their_own_and_every_round_draws_each_bucket_once():
    for size in cases.SIZES:
        names = Counter(case.name for case in cases.wanted(size))
        assert max(names.values()) == 1
    mixed = cases.Case("flux", "real", is_mixed=True)
    assert [str(one) for one in mixed.pictures] == ["1024x1024", "832x1216", "1216x832", "896x1152", "1152x896"]


def test_the_page_shows_what_was_measured_and_what_was_not(tmp_path):
    common = {"key": "k", "commit": "abc", "versions": {"torch": "2"}, "day": "2026-01-01"}
    memory = {
        "planned": {"step": {"vram_bytes": 7e9}},
        "measured": {
            "load": {"allocated": 5e9, "reserved": 6e9},
            "step": {"allocated": 7e9, "reserved": 7.2e9},
            "host_bytes": 3e9,
            "pinned_bytes": 0,
        },
        "goal": {"card_bytes": 8e9, "main_bytes": None},
        "is_met": True,
        "plan_is_off_by": 0.0,
        "seconds": 1.5,
    }
    content = {
        "machine": {"device": "A card", "cores": 2, "threads": 2, "system": "Linux"},
        "cases": {
            "memory of x": {"kind": "memory", **memory, **common},
            "y": {"kind": "speed", "left_out": "it needs the package z", **common},
            "tests": {"kind": "tests", "passed": 3, "failed": ["t: one"], "skipped": 1, **common},
        },
    }

    shown = page([json.loads(json.dumps(content))])

    assert "| x | 7.00 | 7.00 | +0.0% | 7.20 | 5.00 | 3.00 | 0.00 | 1500 | 8 GB: met |" in shown
    assert "- y: it needs the package z" in shown and "3 tests that want a GPU passed, 1 failed" in shown
