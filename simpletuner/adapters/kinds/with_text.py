"""Plain LoRA on a denoiser and on text encoders of its model, all in one file that diffusers' `load_lora_weights` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from simpletuner.adapters.adapter import Adapter, Attached, Keep, Targets, Write, as_it_is
from simpletuner.adapters.kinds.standard import Standard
from simpletuner.adapters.reading import read_changes, read_text_changes

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.options.adapters import Adapters


class WithText(Adapter):
    """A `Standard` for each network. What is not attached takes no part: pictures can be rendered with one network after the other in memory."""

    def __init__(self, options: Adapters, targets: Targets) -> None:
        super().__init__(options, targets)
        self._main = Standard(options, targets)
        # transformers (to 5.23 at least) reads no DoRA of text encoders from a file of diffusers.
        of_denoiser = {"peft_lora_target_modules": None, "flux_lora_target": None, "use_dora": False}
        self._text = {text.folder: Standard(options.model_copy(update=of_denoiser), text) for text in targets.text}
        self._networks: dict[str, nn.Module] = {}
        """Those of the text encoders, once they are attached."""
        self._attached: list[Attached] = []
        self._denoiser: nn.Module | None = None
        self._text_learns = True

    def attach_text(self, networks: Mapping[str, nn.Module]) -> None:
        self._attached = [self._text[folder].attach(network) for folder, network in networks.items()]
        self._networks = dict(networks)

    def attach(self, denoiser: nn.Module) -> Attached:
        every = [self._main.attach(denoiser), *self._attached]
        self._denoiser = denoiser
        modules, total, parameters = (sum(getattr(one, name) for one in every) for name in ("modules", "modules_total", "parameters"))
        return Attached(modules, total, parameters, layers=every[0].layers)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**self._main.parameters(), **self.text_parameters()}

    def text_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{folder}.{name}": parameter for folder in self._networks for name, parameter in self._text[folder].parameters().items()}

    def at_share(self, share: float) -> None:
        self._text_learns = share * 100 < self.options.text_encoder_limit
        for parameter in self.text_parameters().values():
            parameter.requires_grad_(self._text_learns)
        self._train_text(True)

    def set_strength(self, strength: float) -> None:
        for one in (self._main, *self._text.values()):
            one.set_strength(strength)

    def train(self, mode: bool) -> None:
        self._main.train(mode)
        self._train_text(mode)

    def _train_text(self, mode: bool) -> None:
        """Of text encoders the whole network is switched: transformers computes activations twice in that mode alone."""
        for network in self._networks.values():
            network.train(mode and self._text_learns)

    def at_time(self, time: Tensor) -> None:
        self._main.at_time(time)

    def saving(self, metadata: Mapping[str, str], keep: Keep = as_it_is) -> Write:
        return self._main.saving_with([self._text[name] for name in self._networks], metadata, keep)

    def load(self, folder: Path) -> None:
        if self._denoiser is not None:
            layout, model = self._main.layout, type(self._denoiser).__name__
            self._main.take(read_changes(folder, layout, model, leaves_text=True), folder)
        text = [self._text[name] for name in self._networks]
        for one, changes in zip(text, read_text_changes(folder, [one.layout for one in text])) if text else ():
            one.take(changes, folder)

    def snippet(self, pipeline_class: str, base: str, arguments: Mapping[str, object], folder: str) -> str:
        return self._main.snippet(pipeline_class, base, arguments, folder)
