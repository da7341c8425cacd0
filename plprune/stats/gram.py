"""Second moments between channels (SparseGPT, ridge refits)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plprune.stats.base import Stat


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram(Stat):
    """Count, sum and sum of outer products."""

    n: Tensor
    """[] float64, tokens."""
    x_C: Tensor
    """[C] float64, sum of x."""
    xx_CC: Tensor
    """[C, C] float64, sum of x x^T."""

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Gram:
        """Empty statistic for C channels."""
        made = {"dtype": torch.float64, "device": device}
        return cls(
            n=torch.zeros((), **made),  # type: ignore[arg-type]
            x_C=torch.zeros(channels, **made),  # type: ignore[arg-type]
            xx_CC=torch.zeros(channels, channels, **made),  # type: ignore[arg-type]
        )

    def update(self, x_NC: Tensor) -> Gram:
        """Add x and x x^T summed over rows."""
        return replace(self, x_C=self.x_C + x_NC.sum(0), xx_CC=self.xx_CC + x_NC.T @ x_NC)

    def counted(self, rows: Tensor) -> Gram:
        """Add tokens."""
        return replace(self, n=self.n + rows)
