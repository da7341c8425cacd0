"""The loss of a model of which one axis alone is cut, at several widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from plprune.stats.base import Stat, zeros

SHARES = (0.875, 0.75, 0.5, 0.25)
"""Of the units of an axis that stay at each measurement."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve(Stat):
    """Measured for the axis whose units a linear reads; `n` counts tokens that are predicted."""

    dense: Tensor
    """[] sum of the losses of all tokens, nothing cut."""
    loss_G: Tensor
    """[G] the same at each width."""
    units_G: Tensor
    """[G] units that stayed."""

    measured: ClassVar[bool] = True

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Self:
        """For its size alone."""
        del channels
        empty = zeros(len(SHARES), device=device)
        one = zeros(device=device)
        return cls(n=one, dense=one, loss_G=empty, units_G=empty)

    def update(self, x_NC: Tensor) -> Self:
        """Not from activations alone."""
        raise NotImplementedError("measured by `sensitivity.curves`")

    def increase_G(self) -> Tensor:
        """[G] mean loss of a token at each width, above that of the dense model."""
        return (self.loss_G - self.dense) / self.n
