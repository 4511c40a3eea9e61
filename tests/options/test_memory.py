"""Options of activations and attention."""

from __future__ import annotations

import pytest

from simpletuner.cli.choices import known_names
from simpletuner.errors import ConfigError
from simpletuner.options.load import load_config
from simpletuner.options.memory import Memory, size_in_bytes
from simpletuner.options.sources import Setting


def memory(**values) -> Memory:
    settings = [Setting(key, value, "config.json") for key, value in {"model_family": "auraflow", **values}.items()]
    return load_config(settings, lambda name, flavour, location: {}, choices=known_names()).config.memory


@pytest.mark.parametrize(("written", "meant"), [("torch-ffn", "selective"), ("unsloth", "offload"), ("Unsloth-FFN", "offload"), ("torch", "torch")])
def test_names_of_checkpointing_from_elsewhere_are_understood(written, meant):
    assert memory(gradient_checkpointing_backend=written).gradient_checkpointing_backend == meant


@pytest.mark.parametrize(("written", "meant"), [("SDPA", "native"), ("sage", "sageattention"), ("native-math", "native-math")])
def test_short_names_of_attentions_are_understood(written, meant):
    assert memory(attention_mechanism=written).attention_mechanism == meant


def test_an_unknown_attention_is_offered_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'flash-attn-3'"):
        memory(attention_mechanism="flash-attn3")


@pytest.mark.parametrize("mixed", ["no", "fp16"])
def test_bf16_weights_are_for_computing_in_bf16(mixed):
    with pytest.raises(ConfigError, match=f"base_model_default_dtype bf16 needs mixed_precision bf16, which is {mixed}"):
        memory(base_model_default_dtype="bfloat16", mixed_precision=mixed)


def test_more_blocks_than_there_are_cannot_be_computed_again():
    with pytest.raises(ConfigError, match="gradient_checkpointing_segment_stride 2 is below gradient_checkpointing_interval 3"):
        memory(gradient_checkpointing_interval=3, gradient_checkpointing_segment_stride=2)


@pytest.mark.parametrize(("written", "size"), [("6GB", 6 * 10**9), ("6.5 gb", 65 * 10**8), ("512MiB", 2**29), ("9 b", 9), ("8000000", 8 * 10**6)])
def test_sizes_are_read_as_people_write_them(written, size):
    assert size_in_bytes(written) == size


@pytest.mark.parametrize("written", ["much", "6 XB", "GB", "-1GB", "0"])
def test_what_is_no_size_is_refused(written):
    with pytest.raises(ConfigError, match=r"max_resident_weights .* is no size: write it as 6GB"):
        memory(max_resident_weights=written)


def test_a_small_number_without_a_unit_is_no_number_of_bytes():
    with pytest.raises(ConfigError, match=r"max_resident_weights '12' has no unit, and would be bytes: write it as 12GB"):
        memory(max_resident_weights="12")


def test_blocks_to_swap_has_the_name_of_other_tools_too():
    assert memory(musubi_blocks_to_swap=12).blocks_to_swap == 12


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"blocks_to_swap": 2, "enable_group_offload": True}, "blocks_to_swap and enable_group_offload exclude each other"),
        ({"blocks_to_swap": 2, "max_resident_weights": "2GB"}, "blocks_to_swap and max_resident_weights exclude each other"),
        ({"enable_group_offload": True, "enable_model_cpu_offload": True}, "enable_group_offload and enable_model_cpu_offload exclude each other"),
        ({"blocks_to_swap": 2, "model_type": "full"}, "blocks_to_swap cannot be with model_type full"),
        ({"enable_group_offload": True, "model_type": "full"}, "enable_group_offload cannot be with model_type full"),
    ],
)
def test_offloads_that_do_not_go_together_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        memory(**values)
