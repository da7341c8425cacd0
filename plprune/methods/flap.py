"""FLAP: units whose output fluctuates little can be replaced by their mean.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
arXiv 2312.11983, and its release (CASIA-LMC-Lab/FLAP).

    S_j = Var(x_j) * |W_:j|^2        over the inputs of the consuming linear (WIFV)

standardised over the channels of each linear; a unit has the mean of its channels, and one
threshold holds for the whole model (AL-AM). What a removed unit gives on average goes into the bias
of what reads it: stack `compensation: MeanBias` (as published), or LeastSquares, which contains it.

Differences from the release: the variance is that of all tokens (its running estimate loses
terms); heads go with their KV group; a unit's price is counted instead of set to 512/3 channels;
the budget is met exactly.

Not for: half of a model and more, where the standardised scores overshoot in single layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plprune.allocation import Allocation, GlobalThreshold
from plprune.methods.base import View
from plprune.spec import Axis, Spec
from plprune.stats.base import Tap
from plprune.stats.moments import Moments
from plprune.structured import StructuredMethod, consumer_index


@dataclass(frozen=True, kw_only=True)
class FLAP(StructuredMethod):
    """See the module."""

    allocation: Allocation = GlobalThreshold()  # noqa: RUF009 (frozen)
    """One threshold for all standardised scores, as in the release (AL-AM)."""
    square_attention: bool = True
    """Square the channel scores of attention before they are standardised, as the release does."""

    def looks_at(self, spec: Spec) -> tuple[Tap, ...]:
        """Mean and variance at the inputs of the attention output and the down projection."""
        return tuple(Tap(module=name, stat=Moments) for name in spec.consumers(self.kinds))

    def scores(self, view: View) -> dict[str, Tensor]:
        """Standardised fluctuation, by unit."""
        return {axis.name: self._score(view, axis) for axis in self.axes(view.spec)}

    def _score(self, view: View, axis: Axis) -> Tensor:
        consumer, index_Uw = consumer_index(axis)
        moments = view.seen(consumer, Moments)
        norm_C = view.weight(consumer).double().square().sum(0).cpu()
        score_C = moments.variance_C.cpu() * norm_C
        if axis.kind != "mlp" and self.square_attention:
            score_C = score_C.square()
        spread = score_C.std()
        if float(spread) == 0:  # every channel says as much as the others
            return torch.zeros(axis.size, dtype=torch.float64)
        return ((score_C - score_C.mean()) / spread)[index_Uw].mean(1)
