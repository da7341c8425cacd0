"""Taylor scores of LLM-Pruner: how much the loss would change without a unit.

Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
arXiv 2305.11627, and its release (horseee/LLM-Pruner).

    unit score = sum over the rows of q, k, v (gate, up) and the columns of o (down) that go with it
    of I, where for the weights w_j of a row or column with gradients g_j and squares F_j

        vector    |sum_j w_j g_j|
        element1  sum_j |w_j g_j|
        element2  sum_j |w_j g_j - w_j^2 F_j / 2|
        second    sum_j w_j^2 F_j

One forward and one backward pass; blocks come and go, so that the gradients of one block exist at a
time. The release spares the first and last blocks: `allocation: Uniform(spare=[3, 1])`.

Differences from the release: query heads go with the KV head they read (it pairs head h with KV
head h mod n); squares are of single sequences; the budget is of parameters and met exactly.

Not for: masked language modelling, or text much unlike what the model will be used on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from plprune.allocation import Allocation, Uniform
from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.spec import Axis, Spec
from plprune.stats.base import Tap
from plprune.stats.slopes import Slopes
from plprune.structured import StructuredMethod

Order = Literal["vector", "element1", "element2", "second"]
_SUMS = {"vector": "vector", "element1": "first", "element2": "mixed", "second": "second"}


@dataclass(frozen=True, kw_only=True)
class Taylor(StructuredMethod):
    """See the module."""

    allocation: Allocation = Uniform()  # noqa: RUF009 (frozen)
    """Where the budget is spent."""
    score: Order = "element1"
    """Importance of a row or column."""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: for an unknown one.
        """
        super().__post_init__()
        if self.score not in get_args(Order):
            raise ConfigError(
                "unknown method.score", given=repr(self.score), allowed=", ".join(get_args(Order))
            )

    def looks_at(self, spec: Spec) -> tuple[Tap, ...]:
        """Gradients of every linear that a unit is part of."""
        names = {piece.module: None for axis in self.axes(spec) for piece in axis.slices}
        return tuple(Tap(module=name, stat=Slopes) for name in names)

    def scores(self, view: View) -> dict[str, Tensor]:
        """Change of the loss, by unit."""
        return {axis.name: self._score(view, axis) for axis in self.axes(view.spec)}

    def _score(self, view: View, axis: Axis) -> Tensor:
        total_U = torch.zeros(axis.size, dtype=torch.float64)
        for piece in axis.slices:
            side = "R" if piece.side == "out" else "C"
            sums = getattr(
                view.stats[Tap(module=piece.module, stat=Slopes)], f"{_SUMS[self.score]}_{side}"
            )
            total_U += sums.abs()[piece.index].sum(1)
        return total_U
