"""AdamW for bf16 weights: the arithmetic in float32, weights and state kept in bf16 by stochastic rounding.

Letters: N numbers of the tensors that are updated at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from simpletuner.randomness import seed_from

MOST_ON_CPU, MOST_ELSEWHERE = 1 << 18, 1 << 22
"""Numbers that are updated at once: what a cache holds, or what keeps an accelerator busy. Some 30 bytes each are needed meanwhile."""
FUSED_DEVICES = ("cuda", "cpu")
LOWER_HALF = (1 << 16) - 1
NUMBER = "number"
"""In a group, what tells its draws from those of other groups, where its place among them does not."""


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
            most = MOST_ON_CPU if group["params"][0].device.type == "cpu" else MOST_ELSEWHERE
            for part, parameters in enumerate(parts(group["params"], self._kind, most)):
                self._update(parameters, group, f"{group.get(NUMBER, number)}.{part}")
        return loss

    def _kind(self, parameter: nn.Parameter) -> tuple[torch.device, torch.dtype, int]:
        """Parameters are updated at once that have this in common; the last is the steps that they had."""
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        return parameter.device, parameter.dtype, state["step"]

    def _update(self, parameters: Sequence[nn.Parameter], group: dict[str, Any], place: str) -> None:
        """Update them as one flat tensor: hundreds of small ones would cost more in calls than in arithmetic."""
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        step = states[0]["step"]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]

        grad = flat([parameter.grad for parameter in parameters if parameter.grad is not None])  # (N,); all of them have one
        mean, square, value = flat(means), flat(squares), flat(parameters)
        adamw(
            [value],
            [grad],
            [mean],
            [square],
            max_exp_avg_sqs=[],
            state_steps=[torch.full((), step - 1.0, device=value.device)],  # it counts on
            fused=value.device.type in FUSED_DEVICES,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        if parameters[0].dtype == torch.bfloat16:
            generator = torch.Generator(value.device).manual_seed(seed_from("adamw_bf16", group["seed"], step, place))
            for exact, chance in zip((mean, square, value), chances(len(value), generator)):
                round_stochastically_(exact, chance)
        pairs: list[tuple[list[Tensor], Tensor]] = [(means, mean), (squares, square), ([*parameters], value)]
        for targets, new in pairs:
            torch._foreach_copy_(targets, _unflatten_dense_tensors(new, targets))


def parts(parameters: Iterable[nn.Parameter], kind: Callable[[nn.Parameter], Any], most: int) -> Iterator[list[nn.Parameter]]:
    """Part those that have a gradient into runs of one kind, of at most `most` numbers or a single tensor."""
    for _, alike in groupby((parameter for parameter in parameters if parameter.grad is not None), kind):
        part, size = list[nn.Parameter](), 0
        for parameter in alike:
            if part and size + parameter.numel() > most:
                yield part
                part, size = [], 0
            part.append(parameter)
            size += parameter.numel()
        yield part


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All their numbers in one new float32 tensor, (N,)."""
    joined: Tensor = _flatten_dense_tensors(tensors)
    return joined.clone() if len(tensors) == 1 and joined.dtype == torch.float32 else joined.float()


def chances(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw `count` 16-bit numbers three times, int32, (N,). Each two draws are independent: the third is the sum of the others.

    One draw is to be used before the next is asked for: the third takes the place of the first.
    """
    drawn = torch.empty(count, dtype=torch.int32, device=generator.device).random_(-(1 << 31), (1 << 31) - 1, generator=generator)
    high = (drawn >> 16).bitwise_and_(LOWER_HALF)
    yield drawn.bitwise_and_(LOWER_HALF)
    yield high
    yield drawn.add_(high).bitwise_and_(LOWER_HALF)


def round_stochastically_(value: Tensor, chance: Tensor) -> Tensor:
    """Round float32 in place to a neighbour that bf16 has, up or down with the chance that keeps the mean.

    bf16 is the upper half of a float32: a random lower half is added, and the carry decides.

    Args:
        chance: numbers in [0, 2**16), int32, of the same shape.
    """
    value.view(torch.int32).add_(chance).bitwise_and_(~LOWER_HALF)
    return value
