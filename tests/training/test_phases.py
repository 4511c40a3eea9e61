"""What is on the device when: never two networks while caches are filled, and the VAE only while pictures are made, or as long as it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from simpletuner.models.families.auraflow import AuraFlow
from simpletuner.options.memory import Memory
from simpletuner.training.caching import Vae
from tests.builders.run import train_in_process, write_run
from tests.training.families import TINY, family
from tests.training.test_families import CPU

LOOKING = {"validation_prompt": "a cat", "validation_resolution": "32", "validation_num_inference_steps": 1, "max_train_steps": 2}


class Loads:
    """What a run loads, each with what still has weights at that moment."""

    def __init__(self, monkeypatch: Any) -> None:
        self.seen: list[tuple[str, set[str]]] = []
        self._networks: list[tuple[str, nn.Module]] = []
        for name, verb in {"text": "load_text_encoders", "vae": "load_vae", "denoiser": "load_frozen"}.items():
            self._watch(monkeypatch, name, verb)

    def _watch(self, monkeypatch: Any, name: str, verb: str) -> None:
        load = getattr(AuraFlow, verb)

        def watched(family: AuraFlow, *arguments: Any, **named: Any) -> Any:
            self.seen.append((name, {other for other, network in self._networks if any(True for _ in network.parameters())}))
            loaded = load(family, *arguments, **named)
            networks = family.text_modules(loaded) if name == "text" else [loaded]
            self._networks += [(name, network) for network in networks]
            return loaded

        monkeypatch.setattr(AuraFlow, verb, watched)


def test_networks_come_one_after_the_other_and_the_vae_goes_after_each_validation(tmp_path, monkeypatch):
    loads = Loads(monkeypatch)
    write_run(tmp_path, **LOOKING)

    assert train_in_process(tmp_path) == 0

    caching, pictures = loads.seen[:3], loads.seen[3:]
    assert caching == [("text", set()), ("vae", set()), ("denoiser", set())]
    assert pictures == [("vae", {"denoiser"})] * 2  # of the base, and of the last step


def test_keep_vae_loaded_loads_it_once(tmp_path, monkeypatch):
    loads = Loads(monkeypatch)
    write_run(tmp_path, keep_vae_loaded=True, **LOOKING)

    assert train_in_process(tmp_path) == 0

    assert [name for name, _ in loads.seen] == ["text", "vae", "denoiser"]


@pytest.mark.parametrize("name", TINY)
def test_every_vae_works_in_slices_and_tiles(tmp_path, name):
    built, size = family(name), TINY[name].size
    pixels = torch.rand(2, 3, 2 * size.height, 2 * size.width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain, sliced, tiled = (
        Vae(built, Memory(**options), CPU, tmp_path, stays=True) for options in ({}, {"vae_enable_slicing": True}, {"vae_enable_tiling": True})
    )
    networks: list[Any] = [sliced.get(), tiled.get()]

    assert [(network.use_slicing, network.use_tiling) for network in networks] == [(True, False), (False, True)]
    wanted, found, seamed = plain.encode(pixels), sliced.encode(pixels), tiled.encode(pixels)
    for part in wanted:
        assert torch.allclose(found[part], wanted[part], atol=1e-4)
        assert seamed[part].shape == wanted[part].shape
    assert sliced.fingerprint() == plain.fingerprint() != tiled.fingerprint()  # tiles leave seams


def test_validation_decodes_in_slices_and_tiles(tmp_path, monkeypatch):
    seen: list[tuple[bool, bool]] = []
    decode = AutoencoderKL.decode

    def watched(vae: Any, *arguments: Any, **named: Any) -> Any:
        seen.append((vae.use_slicing, vae.use_tiling))
        return decode(vae, *arguments, **named)

    monkeypatch.setattr(AutoencoderKL, "decode", watched)
    write_run(tmp_path, vae_enable_slicing=True, vae_enable_tiling=True, **LOOKING)

    assert train_in_process(tmp_path) == 0

    assert seen == [(True, True)] * 2
