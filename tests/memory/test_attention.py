"""The table of attentions, and what is said where one cannot run."""

from __future__ import annotations

import importlib.util

import pytest
from diffusers import AttentionBackendName

from simpletuner.errors import ConfigError
from simpletuner.memory.attention import ATTENTIONS, check, find, works_here


def test_diffusers_knows_every_backend():
    known = {member.value for member in AttentionBackendName}

    assert {row.backend for row in ATTENTIONS if row.backend} <= known


def test_names_stand_once():
    assert len({row.name for row in ATTENTIONS}) == len(ATTENTIONS)


def test_a_misspelt_name_is_offered_the_nearest():
    with pytest.raises(ConfigError, match="'xformer' is unknown") as failed:
        find("xformer")

    assert "did you mean 'xformers'?" in str(failed.value.hint)


def test_what_needs_a_gpu_says_so_and_names_what_works_here():
    with pytest.raises(ConfigError, match=r"cudnn needs a device of type cuda; this machine trains on cpu") as failed:
        check(find("cudnn"), "cpu")

    assert failed.value.hint == "Here these work: diffusers, native, native-math, native-flash."


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(ConfigError, match="flash-attn needs the package flash_attn, which is not installed") as failed:
        check(find("flash-attn"), "cuda")

    assert str(failed.value.hint).startswith("pip install flash-attn")


def test_kernels_without_masks_are_refused_to_models_that_hide_padding():
    with pytest.raises(ConfigError, match="native-flash cannot hide padding, and chroma must"):
        check(find("native-flash"), "cpu", "chroma")

    assert "native-flash" not in works_here("cpu", "chroma")
    assert "native-math" in works_here("cpu", "chroma")
