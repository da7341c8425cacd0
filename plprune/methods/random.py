"""Random units: the control every criterion has to beat.

Used as such by Ma et al., LLM-Pruner, NeurIPS 2023, arXiv 2305.11627.

    S_u = a number drawn from [0, 1)

Not for: anything but comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plprune.data import mixed_seed
from plprune.methods.base import View
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.structured import StructuredMethod


@dataclass(frozen=True, kw_only=True)
class Random(StructuredMethod):
    """Every unit gets a number drawn from [0, 1)."""

    seed: int = 0
    """Of the draw; every axis has a stream of its own."""

    @property
    def needs_data(self) -> bool:
        """No, unless the allocation does."""
        return self.allocation.needs_data

    def looks_at(self, spec: Spec) -> tuple[Tap, ...]:
        """Nothing."""
        del spec
        return ()

    def scores(self, view: View) -> dict[str, Tensor]:
        """Numbers that depend on seed and axis alone."""
        return {
            axis.name: torch.rand(
                axis.size, generator=torch.Generator().manual_seed(mixed_seed(self.seed, number))
            )
            for number, axis in enumerate(self.axes(view.spec))
        }
