"""Sum and sum of squares a channel (FLAP's fluctuation, mean-bias compensation)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plprune.stats.base import Stat, zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments(Stat):
    """Count, sum and sum of squares."""

    x_C: Tensor
    """[C] float64, sum of x."""
    xx_C: Tensor
    """[C] float64, sum of x^2."""

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Empty statistic for C channels."""
        return cls(
            n=zeros(device=device),
            x_C=zeros(channels, device=device),
            xx_C=zeros(channels, device=device),
        )

    def update(self, x_NC: Tensor) -> Moments:
        """Add x and x^2 summed over rows."""
        return replace(self, x_C=self.x_C + x_NC.sum(0), xx_C=self.xx_C + x_NC.square().sum(0))

    @property
    def mean_C(self) -> Tensor:
        """[C] float64, mean of x."""
        return self.x_C / self.n

    @property
    def variance_C(self) -> Tensor:
        """[C] float64, population variance of x, never below zero."""
        return (self.xx_C / self.n - self.mean_C**2).clamp_min(0)
