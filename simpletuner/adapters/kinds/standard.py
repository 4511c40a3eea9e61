"""Plain LoRA through PEFT, in files that diffusers' `load_lora_weights` reads.

Letters: I inputs and O outputs of a layer, r rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from simpletuner.adapters import snippet, weights
from simpletuner.adapters.adapter import ADAPTER_FILE, Adapter, Attached, Keep, Targets, Write, as_it_is
from simpletuner.adapters.added_product import QuickLora
from simpletuner.adapters.changes import Changes, is_by_inputs, scale_of
from simpletuner.adapters.key_maps import Layout
from simpletuner.adapters.reading import read_changes
from simpletuner.adapters.targets import adaptable, is_quantised, layout_of, match_suffix, names_hint
from simpletuner.errors import ConfigError, choose

if TYPE_CHECKING:
    from simpletuner.options.adapters import Adapters

NAME = "default"
"""PEFT's name for the one adapter there is; it leaves the keys before they are saved."""
MOVES_BASE = ("olora", "pissa")
"""Initialisations that start from parts of the base's weight, which PEFT would take out of the base."""

PEFT_IMPORTS = ("import json", "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict", "from safetensors import safe_open")
WITH_PEFT = """\
# This pipeline has no load_lora_weights: PEFT puts the file on its {folder}.
with safe_open({file!r}, "pt") as file:
    settings = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = {{name.removeprefix("{folder}."): file.get_tensor(name) for name in file.keys()}}
config = LoraConfig(**{{name.removeprefix("{folder}."): value for name, value in settings.items()}})
pipeline.{folder} = inject_adapter_in_model(config, pipeline.{folder})
set_peft_model_state_dict(pipeline.{folder}, tensors)
pipeline.{folder}.to(dtype)"""


class Standard(Adapter):
    """Low-rank matrices B A beside the denoiser's linear layers, which PEFT wraps in place."""

    def __init__(self, options: Adapters, targets: Targets) -> None:
        super().__init__(options, targets)
        self._denoiser: Any = nn.Identity()
        self._layout = Layout(targets.folder, targets.original_layout, {})
        self._layers: dict[str, Any] = {}
        """PEFT's LoRA layers by the names of the modules that they wrap."""
        alpha: Any = options.lora_rank if options.lora_alpha is None else options.lora_alpha  # PEFT declares int and takes float
        self._config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=alpha,
            lora_dropout=options.lora_dropout,
            init_lora_weights="gaussian" if options.lora_init_type == "gaussian" else True,
            use_dora=options.use_dora,
        )

    @property
    def layout(self) -> Layout:
        """Of the network that it is attached to."""
        return self._layout

    def attach(self, denoiser: nn.Module) -> Attached:
        denoiser.requires_grad_(False)
        modules = adaptable(denoiser)
        names = self._targets(denoiser, list(modules))
        self._check_base(modules, names)
        self._config.target_modules = names
        self._layout = layout_of(denoiser, self.targets.folder, self.targets.original_layout)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear")  # speaks of merging, which training does not do
            inject_adapter_in_model(self._config, denoiser, adapter_name=NAME)
        self._denoiser = denoiser
        self._layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
        for layer in self._layers.values():
            if self.options.lora_init_type in MOVES_BASE:
                _start_inside_base(layer, self.options.lora_init_type)
            elif not self.options.use_dora:
                _compute_in_input_dtype(layer)
                if isinstance(layer.lora_A[NAME], nn.Linear):
                    layer.forward = QuickLora(layer, NAME).forward
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()
        return Attached(
            modules=len(self._layers),
            modules_total=len(modules),
            parameters=sum(parameter.numel() for parameter in self.parameters().values()),
            layers=tuple(self._layers),
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        named = ((f"{path}.{name}", parameter) for path, layer in self._layers.items() for name, parameter in layer.named_parameters())
        return {name.replace(f".{NAME}.", "."): parameter for name, parameter in named if f".{NAME}." in name}

    def set_strength(self, strength: float) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = strength == 0  # the public switch also drops requires_grad
            layer.set_scale(NAME, strength)

    def train(self, mode: bool) -> None:
        for layer in self._layers.values():
            layer.lora_dropout.train(mode)

    def saving(self, metadata: Mapping[str, str], keep: Keep = as_it_is) -> Write:
        """What writes `<folder>.<module>.lora_A.weight` and so on, with PEFT's settings in the header, all as diffusers does."""
        return self.saving_with((), metadata, keep)

    def saving_with(self, others: Sequence[Standard], metadata: Mapping[str, str], keep: Keep) -> Write:
        """The same with the LoRAs of other networks in the file."""
        every = (self, *others)
        settings = {f"{one._layout.part}.{key}": value for one in every for key, value in one._saved_settings().items()}
        network = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self._config.r),
            "ss_network_alpha": f"{self._config.lora_alpha:g}",
        }
        header = {**metadata, **network, "format": "pt", "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
        kept = keep({name: value for one in every for name, value in one._state().items()})
        return lambda folder: weights.write(folder / ADAPTER_FILE, {name: value.float().cpu() for name, value in kept.items()}, header)

    def load(self, folder: Path) -> None:
        self.take(read_changes(folder, self._layout, type(self._denoiser).__name__), folder)

    def take(self, changes: Changes, folder: Path) -> None:
        """Take over what was read from a file, whose folder is for errors."""
        if any(is_by_inputs(parts) for parts in changes.values()):
            raise ConfigError(
                f"{folder} has DoRA over inputs (wd_on_out false); use_dora is over outputs", hint="Merge it into the base, and train on that."
            )
        expected, own = self._state(), self._config.lora_alpha / self._config.r
        found: dict[str, Tensor] = {}
        for layer, parts in changes.items():
            names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
            for part, value in parts.items():
                if part == "lora_up.weight" and scale_of(parts) != own:
                    value = value * (scale_of(parts) / own)  # of another alpha: the effect stays, the scale is ours
                if part != "alpha":
                    like = expected.get(key := f"{self.targets.folder}.{layer}.{names.get(part, part)}")
                    found[key] = value.reshape(like.shape) if like is not None and like.numel() == value.numel() else value
        weights.check_keys(folder, found, expected)
        weights.check_shapes(folder, found, expected)
        with torch.no_grad():
            for path, layer in self._layers.items():
                prefix = f"{self.targets.folder}.{path}"
                _set_both(layer.lora_A[NAME], found[f"{prefix}.lora_A.weight"], dim=0)
                _set_both(layer.lora_B[NAME], found[f"{prefix}.lora_B.weight"], dim=1)
                if self.options.use_dora:
                    layer.lora_magnitude_vector[NAME].weight.copy_(found[f"{prefix}.lora_magnitude_vector"])

    def snippet(self, pipeline_class: str, base: str, arguments: Mapping[str, object], folder: str) -> str:
        imports, load = [f"from diffusers import {pipeline_class}"], f"pipeline = {pipeline_class}.from_pretrained({base!r}, torch_dtype=dtype)"
        if self.targets.pipeline_loads_lora:
            return snippet.render(imports, [load, f"pipeline.load_lora_weights({folder!r})"], arguments)
        lines = WITH_PEFT.format(file=f"{folder}/{ADAPTER_FILE}", folder=self.targets.folder).splitlines()
        return snippet.render([*PEFT_IMPORTS[:1], *imports, *PEFT_IMPORTS[1:]], [load, *lines], arguments)

    def _targets(self, denoiser: nn.Module, names: list[str]) -> list[str]:
        """The names of the modules to adapt. Each suffix that the user gave must match; of the family's, one."""
        chosen = self.options.peft_lora_target_modules
        for suffix in chosen or ():
            if not match_suffix(suffix, names):
                raise ConfigError(
                    f"peft_lora_target_modules: {suffix!r} matches no Linear or Conv of {type(denoiser).__name__}", hint=names_hint(suffix, names)
                )
        usual = self._preset() if self.options.flux_lora_target and not chosen else self.targets.suffixes
        found = {name for suffix in chosen or usual for name in match_suffix(suffix, names)}
        if not found:
            raise ConfigError(
                f"none of the LoRA targets {', '.join(usual)} is in {type(denoiser).__name__}",
                hint=f"Set peft_lora_target_modules. {names_hint('', names)}",
            )
        return [name for name in names if name in found]

    def _preset(self) -> tuple[str, ...]:
        """The set of suffixes that the options name."""
        name, known = self.options.flux_lora_target or "", self.targets.presets
        if not known:
            raise ConfigError(f"flux_lora_target {name!r}: this family has no sets of targets", hint="Set peft_lora_target_modules instead.")
        if name not in known:
            raise ConfigError(f"flux_lora_target {name!r} is unknown", hint=choose(name, known, "sets of targets"))
        return tuple(known[name])

    def _check_base(self, modules: Mapping[str, nn.Module], names: list[str]) -> None:
        """Refuse what must read the base's weights where they are quantised, and what moves a base it cannot move."""
        start = self.options.lora_init_type
        if start in MOVES_BASE and self.options.use_dora:
            raise ConfigError(f"lora_init_type {start} and use_dora exclude each other", hint="Leave one of them out.")
        if any(is_quantised(modules[name]) for name in names) and (self.options.use_dora or start in MOVES_BASE):
            what = "use_dora" if self.options.use_dora else f"lora_init_type {start}"
            raise ConfigError(f"{what} must read the weights of the base, which are quantised", hint="Set base_model_precision to no_change.")
        if start in MOVES_BASE and not all(isinstance(modules[name], nn.Linear) for name in names):
            raise ConfigError(f"lora_init_type {start} adapts Linear layers only", hint="Leave Conv layers out of peft_lora_target_modules.")

    def _state(self) -> dict[str, Tensor]:
        """What the file holds, where it is computed with."""
        state = {name: value.detach() for name, value in get_peft_model_state_dict(self._denoiser, adapter_name=NAME).items()}
        for path, layer in self._layers.items():
            for key, dim in (("lora_A", 0), ("lora_B", 1)):
                pair = getattr(layer, key)[NAME]
                if isinstance(pair, _FromStart):
                    state[f"{path}.{key}.weight"] = pair.both(dim).detach()
        return {f"{self.targets.folder}.{name}": value for name, value in state.items() if not name.endswith(".start")}

    def _saved_settings(self) -> dict[str, object]:
        """PEFT's settings for the tensors in the file; a start inside the base doubles the rank, at the same scale."""
        doubled = 2 if self.options.lora_init_type in MOVES_BASE else 1
        return {
            "r": self._config.r * doubled,
            "lora_alpha": self._config.lora_alpha * doubled,
            "lora_dropout": self._config.lora_dropout,
            "use_dora": self._config.use_dora,
            "init_lora_weights": True,
            "target_modules": sorted(self._layers),
        }


def apply_with_peft(file: Path, denoiser: nn.Module, folder: str) -> None:
    """Put a file in diffusers' layout on a denoiser whose pipeline cannot load it, as PEFT does for everyone.

    Args:
        folder: the denoiser's name in diffusers layout, with which keys begin.
    """
    settings = json.loads(weights.metadata_of(file)["lora_adapter_metadata"])
    inject_adapter_in_model(LoraConfig(**{name.removeprefix(f"{folder}."): value for name, value in settings.items()}), denoiser)
    tensors = {name.removeprefix(f"{folder}."): value for name, value in weights.read(file).items()}
    set_peft_model_state_dict(denoiser, tensors)


class _Cast(nn.Linear):
    """A Linear whose float32 weight is rounded to its input's dtype at the product.

    PEFT casts the input to the weight's dtype instead, which keeps a float32 copy of every activation.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class _FromStart(_Cast):
    """Half of a low-rank change that is measured from where it started: B A - B0 A0 as one product of rank 2r."""

    start: Tensor

    def both(self, dim: int) -> Tensor:
        """Trained and initial matrix side by side: A over A0, (2r, I); B beside -B0, (O, 2r)."""
        return torch.cat([self.weight, self.start if dim == 0 else -self.start], dim)


class _Down(_FromStart):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.both(0).to(x.dtype))


class _Up(_FromStart):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.both(1).to(x.dtype))


def _compute_in_input_dtype(layer: Any, down: type[_Cast] = _Cast, up: type[_Cast] = _Cast) -> None:
    """Let a LoRA layer multiply in the dtype of its input; Conv layers stay with PEFT's casts."""
    if isinstance(layer.lora_A[NAME], nn.Linear):
        for part, kind in ((layer.lora_A, down), (layer.lora_B, up)):
            replacement = kind(1, 1, bias=False, device="meta")
            replacement.weight = part[NAME].weight
            part[NAME] = replacement
        layer.cast_input_dtype_enabled = False


def _start_inside_base(layer: Any, kind: str) -> None:
    """Initialise from the base's weight and leave the base whole: the initial product is subtracted in the adapter.

    PEFT subtracts it from the base instead, after which neither the plain base nor strength 0 would be the model
    that other software has.
    """
    base = layer.get_base_layer().weight
    before = base.data.clone()
    layer.olora_init(NAME) if kind == "olora" else layer.pissa_init(NAME, kind)
    base.data = before
    _compute_in_input_dtype(layer, _Down, _Up)
    for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
        part.weight.data = part.weight.data.float().contiguous()
        part.register_buffer("start", part.weight.detach().clone())


def _set_both(part: Any, value: Tensor, dim: int) -> None:
    """Fill a matrix from a file, and its start where it has one."""
    if isinstance(part, _FromStart):
        value, start = value.chunk(2, dim)
        part.start.copy_(start if dim == 0 else -start)
    part.weight.copy_(value)
