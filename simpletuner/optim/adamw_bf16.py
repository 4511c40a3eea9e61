"""AdamW for bf16 weights: the arithmetic in float32, weights and state kept in bf16 by stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.randomness import seed_from


class AdamWBF16(Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019) in as little memory as bf16 weights have.

    Rounded to nearest, an update below 1/256 of a weight would be lost; rounded up or down by chance, in proportion,
    it is kept on average. State has the dtype of its parameter, so float32 parameters are trained exactly as by AdamW.
    The chance is drawn from the step's number: nothing but the state is needed to continue.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}, it must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, each must be at least 0 and less than 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure`, as everywhere in torch, computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, f"{number}.{index}")
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], place: str) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"]

        assert parameter.grad is not None  # the caller skips those without
        grad = parameter.grad.float()
        mean = state["exp_avg"].float().lerp(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        value = parameter.float() * (1 - lr * group["weight_decay"])
        value.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))

        generator = torch.Generator(parameter.device).manual_seed(seed_from("adamw_bf16", group["seed"], step, place))
        for target, exact in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (parameter, value)):
            target.copy_(round_stochastically(exact, generator) if target.dtype == torch.bfloat16 else exact)


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to a neighbour in bf16, up or down with the chance that keeps the mean.

    bf16 is the upper half of a float32: a random lower half is added, and the carry decides.
    """
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    return (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
