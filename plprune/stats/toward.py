"""Second moments between the inputs of a linear and what it should say.

Legend: R rows, C columns of the linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from plprune.stats.base import zeros
from plprune.stats.gram import Gram


@dataclass(frozen=True, kw_only=True, eq=False)
class Toward(Gram):
    """Sums of inputs x as in `Gram`, and of wanted outputs y."""

    y_R: Tensor
    """[R] float64, sum of y."""
    yx_RC: Tensor
    """[R, C] float64, sum of y x^T."""

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu", rows: int = 0) -> Toward:
        """Empty statistic for C channels and R rows."""
        return cls(
            **vars(Gram.zero(channels, device)),
            y_R=zeros(rows, device=device),
            yx_RC=zeros(rows, channels, device=device),
        )

    def update(self, x_NC: Tensor) -> Toward:
        """Add rows of [N, C + R]: inputs, and beside them the wanted outputs."""
        x_NC, y_NR = x_NC[:, : len(self.x_C)], x_NC[:, len(self.x_C) :]
        return replace(
            cast(Toward, super().update(x_NC)),
            y_R=self.y_R + y_NR.sum(0),
            yx_RC=self.yx_RC.add_(y_NR.T @ x_NC),
        )
