"""Second moments between channels (SparseGPT, ridge refits)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plprune.stats.base import Stat, zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram(Stat):
    """Count, sum and sum of outer products."""

    x_C: Tensor
    """[C] float64, sum of x."""
    xx_CC: Tensor
    """[C, C] float64, sum of x x^T."""

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Gram:
        """Empty statistic for C channels."""
        return cls(
            n=zeros(device=device),
            x_C=zeros(channels, device=device),
            xx_CC=zeros(channels, channels, device=device),
        )

    def update(self, x_NC: Tensor) -> Gram:
        """Add x and x x^T summed over rows, the latter in place: it is the largest thing around."""
        return replace(self, x_C=self.x_C + x_NC.sum(0), xx_CC=self.xx_CC.add_(x_NC.T @ x_NC))
