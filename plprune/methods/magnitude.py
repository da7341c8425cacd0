"""Magnitude pruning: the weights that are smallest go.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv 1506.02626. The oldest baseline; it needs no data.

    S_ij = |W_ij|        compared within one linear

Differences: counts are exact; releases take a threshold and drop all weights that tie with it.

Not for: language models above a few ten percent, or any N:M pattern; Wanda costs seconds more.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plprune.methods.base import View
from plprune.sparse import ScoredSparse
from plprune.spec import Spec
from plprune.stats.base import Tap


@dataclass(frozen=True, kw_only=True)
class Magnitude(ScoredSparse):
    """Score |W| (LeCun, Denker and Solla 1990; Han et al. 2015)."""

    pattern: str = "layer"
    """Weights are compared within a `layer` (one linear; as is usual), a `row`, or N:M."""

    @property
    def needs_data(self) -> bool:
        """No, unless the allocation does."""
        return self.allocation.needs_data

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """None."""
        del spec
        return ()

    def score(self, view: View, name: str) -> Tensor:
        """|W|."""
        return view.weight(name).abs()
