"""Sum of squares a channel (Wanda, TransAct)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plprune.stats.base import Stat, zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class Energy(Stat):
    """Count and sum of squares."""

    xx_C: Tensor
    """[C] float64, sum of x^2."""

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Energy:
        """Empty statistic for C channels."""
        return cls(n=zeros(device=device), xx_C=zeros(channels, device=device))

    def update(self, x_NC: Tensor) -> Energy:
        """Add x^2 summed over rows."""
        return replace(self, xx_C=self.xx_C + x_NC.square().sum(0))
