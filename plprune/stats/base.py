"""What a statistic is and where it is taken.

Legend: N rows of a batch (samples times tokens), C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, eq=False)
class Stat(ABC):
    """Sums over tokens: all fields are float64 tensors that add."""

    backward: ClassVar[bool] = False
    """Whether it is made of gradients instead of activations."""
    measured: ClassVar[bool] = False
    """Whether it is made of losses, of a model of which units are masked by their scores."""
    n: Tensor
    """[] float64, tokens."""

    @classmethod
    @abstractmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Self:
        """Empty statistic for C channels."""

    @abstractmethod
    def update(self, x_NC: Tensor) -> Self:
        """Add the rows of one batch to all sums but the count."""

    def counted(self, rows: Tensor) -> Self:
        """Add a number of tokens (0-d float64) to the count."""
        return replace(self, n=self.n + rows)

    def __add__(self, other: Self) -> Self:
        """Merge two disjoint streams."""
        return self.mapped(lambda name, value: value + getattr(other, name))

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """The same statistic with every sum changed by a function of its name and value."""
        return replace(self, **{name: change(name, value) for name, value in vars(self).items()})

    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, the count first."""
        return tuple(vars(self).values())


def zeros(*shape: int, device: torch.device | str) -> Tensor:
    """Float64 zeros, the start of every sum."""
    return torch.zeros(shape, dtype=torch.float64, device=device)


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where a statistic is taken."""

    module: str
    """Module path in the Hugging Face model."""
    stat: type[Stat]
    """Which sums."""
    side: Literal["input", "stream"] = "input"
    """`input`: the module's first input. `stream`: the residual stream in front of something and
    behind it, one beside the other in the last dimension."""
    until: str = ""
    """For `stream`: the module whose output is added to the input of `module`; empty: the output of
    `module` is the stream again."""


def fold(stat: Stat, x: Tensor, token_mask: Tensor | None = None) -> Stat:
    """Add one activation to a statistic.

    Args:
        stat: sums so far.
        x: [..., C] activation in any float dtype.
        token_mask: shape of `x` without its last dimension, True for tokens that count; None
            counts all.

    Returns:
        The new sums. Batches are summed in float32 (or better), running sums are float64: 5e5
        squared terms would lose digits in float32.
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
