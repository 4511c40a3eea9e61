"""How far two answers of a denoiser are apart, measured by what the adapter changes in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SHARE = 1e-3
"""Of the adapter's effect, by which a reader's answer may differ: rounding, in float32."""
ROUNDING = 1e-5
"""Of the answer itself: what float32 leaves uncertain if the sum is taken in another order."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest differences among the numbers of an answer."""

    difference: float
    """Between the trained model and the one that read a file."""
    effect: float
    """Between the trained model and its base."""
    size: float
    """The largest number in the answer."""

    @property
    def is_equal(self) -> bool:
        return self.difference <= SHARE * self.effect + ROUNDING * self.size

    def said(self, what: str = "one denoiser call") -> str:
        return f"{what} differs by {self.difference:.1e} at most; the adapter changes it by {self.effect:.1e}"


def compare(plain: Tensor, trained: Tensor, read: Tensor) -> Comparison:
    """Compare answers of the base, of the trained model, and of the base with a file that was read."""
    return Comparison(difference=(read - trained).abs().max().item(), effect=(trained - plain).abs().max().item(), size=trained.abs().max().item())
