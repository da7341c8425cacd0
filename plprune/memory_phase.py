"""Bytes that one part of a run needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Step:
    """Peaks inside an optimizer step, in bytes beyond weights and optimizer state."""

    passes: int
    """Of forward and backward pass, gradients included."""
    alone: int
    """Of forward and backward pass, without the gradients that are finished."""
    update: int
    """Temporary tensors of the optimizer, beyond the gradients."""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """What a cut takes, in bytes; first the check before it, then the cut itself."""

    gradients: int
    """Of the last step; they are dropped after the check."""
    check: int
    """A forward pass of the check."""
    new: int
    """New tensors, beside the old ones."""
    left: float
    """Share of all weights that is left."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Peak of one part of a run on one device, in bytes."""

    name: str
    """What is going on."""
    weights: int = 0
    """Parameters and buffers, adapters included."""
    gradients: int = 0
    """Gradients of what is trained."""
    optimizer: int = 0
    """Optimizer state."""
    activations: int = 0
    """What comes on top at the peak: activations, logits and temporary tensors."""
    statistics: int = 0
    """Sums of a calibration pass."""
    copies: int = 0
    """New tensors of a cut, or the file being written."""
    step: Step | None = None
    """Of a training step: the peaks that `activations` is the larger of."""
    cutting: Cutting | None = None
    """Of a cut: what `activations` and `copies` are made of."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value for value in vars(self).values() if isinstance(value, int))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {k: v for k, v in vars(self).items() if k not in ("step", "cutting")}
        return {**plain, "total": self.total}
