"""How much a part of the model turns the residual stream (ShortGPT's block influence)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plprune.stats.base import Stat, zeros


@dataclass(frozen=True, kw_only=True, eq=False)
class Cosine(Stat):
    """Count, and sum of the cosines between what enters and what leaves; taps `side: stream`."""

    cosine: Tensor
    """[] float64, sum over tokens."""

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Cosine:
        """Empty; the number of channels does not matter."""
        del channels
        return cls(n=zeros(device=device), cosine=zeros(device=device))

    def update(self, x_NC: Tensor) -> Cosine:
        """Add the cosines of the first and the second half of each row.

        Args:
            x_NC: [N, 2 H], what enters beside what leaves.
        """
        # Cosines are within 1e-3 of 1 in most blocks: float32 would leave four digits of that.
        enters_NH, leaves_NH = x_NC.double().chunk(2, dim=1)
        norm_N = enters_NH.norm(dim=1) * leaves_NH.norm(dim=1)
        # Where nothing enters or nothing leaves: the same only if neither does. NaN stays NaN.
        both_N = (enters_NH == leaves_NH).all(dim=1).double()
        cosine_N = torch.where(norm_N == 0, both_N, (enters_NH * leaves_NH).sum(1) / norm_N)
        return replace(self, cosine=self.cosine + cosine_N.sum())

    @property
    def influence(self) -> Tensor:
        """[] float64, 1 - mean cosine."""
        return 1 - self.cosine / self.n
