"""T-LoRA's rank masks (see `ranks`) on the modules of a LyCORIS network, and in the lines that others paste.

Letters: B batch, r rank; Q (r, I), P (O, r) and the diagonal l of a module, Q0, P0, l0 as they were at the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lycoris.modules.tlora import TLoraModule
from torch import Tensor

from simpletuner.adapters.ranks import RankRule, Ranks


class RankMasks(Ranks):
    """Masks the ranks of a network's modules by the time that it was last told."""

    def __init__(self, modules: Iterable[Any], least: int, alpha: float) -> None:
        """
        Args:
            modules: of the network; those of T-LoRA are masked from now on, the others are left alone.
        """
        self.modules = [module for module in modules if isinstance(module, TLoraModule)]
        super().__init__(RankRule(max((module.lora_dim for module in self.modules), default=0), least, alpha))
        for module in self.modules:
            module.bypass_forward_diff = _Masked(self, module)

    @property
    def most(self) -> int:
        """Ranks of the largest module."""
        return self.rule.most


class _Masked:
    """What a module adds to its layer's output; takes the place of the library's own method.

    That one knows one mask for a batch, and subtracts two large products, which leaves nothing of small changes in 16 bits. Here
    P l Q - P0 l0 Q0 = (P - P0) l Q + P0 ((l - l0) Q + l0 (Q - Q0)), of which each product is small.
    """

    def __init__(self, masks: RankMasks, module: Any) -> None:
        self._masks, self._module = masks, module

    def __call__(self, x: Tensor, scale: float = 1.0) -> Tensor:
        module = self._module
        mask = self._masks.of(module.lora_dim, x.shape[0], x.device)
        q, p, q0, p0 = module.q_layer.weight, module.p_layer.weight, module.base_q, module.base_p
        down, up = (module.kw_dict_down, module.kw_dict_up) if module.isconv else ({}, {})
        whole = module.down_op(x, q.to(x.dtype), None, **down)
        moved = module.down_op(x, (q - q0).to(x.dtype), None, **down)
        ranks = (-1, module.lora_dim, *[1] * (x.ndim - 2)) if module.isconv else (-1, *[1] * (x.ndim - 2), module.lora_dim)

        def diagonal(values: Tensor) -> Tensor:
            return (values if mask is None else values * mask).view(ranks).to(x.dtype)

        now, start = module.lambda_layer, module.base_lambda
        turned = module.up_op(whole * diagonal(now), (p - p0).to(x.dtype), None, **up)
        stretched = module.up_op(whole * diagonal(now - start) + moved * diagonal(start), p0.to(x.dtype), None, **up)
        added: Tensor = module.dropout((turned + stretched) * module.scale * scale)
        return added


SNIPPET = """\
# A T-LoRA has fewer ranks where there is more noise. Without this mask it is another adapter than the one that was trained.
def mask_ranks(denoiser, arguments, named):
    timestep = {timestep}
    set_timestep_mask(compute_timestep_mask(float(timestep), {total}, {most}, {least}, {alpha:g}))
pipeline.{folder}.register_forward_pre_hook(mask_ranks, with_kwargs=True)"""


def snippet_lines(folder: str, most: int, least: int, alpha: float) -> list[str]:
    """Python that masks the ranks of a loaded T-LoRA at each step of a pipeline.

    Args:
        folder: the denoiser's name in the pipeline. A U-Net is told its step; what others are told differs, and their sampler knows.
    """
    of_sampler = "pipeline.scheduler.timesteps[pipeline.scheduler.step_index or 0]"
    timestep = "arguments[1]" if folder == "unet" else of_sampler
    total = "pipeline.scheduler.config.num_train_timesteps"
    return SNIPPET.format(timestep=timestep, total=total, most=most, least=least, alpha=alpha, folder=folder).splitlines()
