"""What a statistic is and where it is taken.

Legend: N rows of a batch (samples times tokens), C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self


class Stat(ABC):
    """Sums over tokens. Subclasses are frozen dataclasses whose fields are float64 tensors that add."""

    @classmethod
    @abstractmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Self:
        """Empty statistic for C channels."""

    @abstractmethod
    def update(self, x_NC: Tensor) -> Self:
        """Add the rows of one batch; rows that do not count were zeroed and `count` says how many do."""

    @abstractmethod
    def counted(self, rows: Tensor) -> Self:
        """Add a number of tokens (0-d float64) to the count."""

    def __add__(self, other: Self) -> Self:
        """Merge two disjoint streams."""
        return replace(
            self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )  # type: ignore[type-var,arg-type]

    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, in field order, for a collective."""
        return tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where a statistic is taken."""

    module: str
    """Module path in the Hugging Face model."""
    stat: type[Stat]
    """Which sums."""
    side: Literal["input"] = "input"
    """The module's first input."""


def fold(stat: Stat, x: Tensor, token_mask: Tensor | None = None) -> Stat:
    """Add one activation to a statistic.

    Args:
        stat: sums so far.
        x: [..., C] activation in any float dtype.
        token_mask: shape of `x` without its last dimension, True for tokens that count; None counts all.

    Returns:
        The new sums. Batches are summed in float32 (or better), running sums are float64: 5e5 squared terms
        would lose digits in float32.
    """
    x_NC = x.detach().reshape(-1, x.shape[-1])
    x_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
    if token_mask is None:
        rows = torch.tensor(float(len(x_NC)), dtype=torch.float64, device=x.device)
    else:
        keep_N = token_mask.to(x.device, torch.bool).reshape(-1)
        # Padding may hold anything, NaN included: select instead of multiplying by zero.
        x_NC = x_NC[keep_N]
        rows = keep_N.sum(dtype=torch.float64)
    return stat.update(x_NC).counted(rows)
