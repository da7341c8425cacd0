"""Sum of squares a channel (Wanda, TransAct, OWL).

Legend: R rows, C columns of a linear.
"""

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


def weighed(weight_RC: Tensor, seen: Energy) -> Tensor:
    """|W_ij| times the root of the mean square of input j, as Wanda and OWL compare weights.

    Args:
        weight_RC: [R, C], any float dtype.
        seen: of the inputs.

    Returns:
        [R, C] float32, on the device of the weight.
    """
    scale_C = (seen.xx_C / seen.n).sqrt().to(weight_RC.device, torch.float32)
    return weight_RC.abs().float() * scale_C
