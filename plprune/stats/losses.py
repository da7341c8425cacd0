"""The loss of a model of which one axis alone is cut, at several widths."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from plprune.stats.base import Stat, zeros

SHARES = (0.875, 0.75, 0.5, 0.25)
"""Of the units of an axis that stay at each measurement."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCurve(Stat):
    """Measured for the axis whose units a linear reads; `n` counts tokens that are predicted."""

    dense: Tensor
    """[] sum of the losses of all tokens, nothing cut."""
    loss_G: Tensor
    """[G] the same at each width."""
    units_G: Tensor
    """[G] units that stayed."""

    measured: ClassVar[bool] = True

    @classmethod
    def zero(cls, channels: int, device: torch.device | str = "cpu") -> Self:
        """For its size alone."""
        del channels
        empty = zeros(len(SHARES), device=device)
        one = zeros(device=device)
        return cls(n=one, dense=one, loss_G=empty, units_G=empty)

    def update(self, x_NC: Tensor) -> Self:
        """Not from activations alone."""
        raise NotImplementedError("measured by `sensitivity.curves`")

    def increase_G(self) -> Tensor:
        """[G] mean loss of a token at each width, above that of the dense model."""
        return (self.loss_G - self.dense) / self.n


def marginal_losses(curve: LossCurve, size: int) -> Tensor:
    """What the loss gains by each unit of an axis, the one that stays longest first.

    Args:
        curve: measured at some widths.
        size: units of the axis.

    Returns:
        [U] float64, not negative, falling: slopes of the convex hull of the measured points,
        between whose middles they change linearly.
    """
    points = [(float(size), 0.0)]
    for units, loss in sorted(
        zip(curve.units_G.tolist(), curve.increase_G().tolist(), strict=True), reverse=True
    ):
        if units < points[-1][0]:
            points.append((units, max(loss, points[-1][1])))
    hull = points[:1]
    for point in points[1:]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    middles = [(a[0] + b[0]) / 2 for a, b in pairwise(hull)]
    slopes = [_slope(a, b) for a, b in pairwise(hull)]
    at = np.arange(size) + 0.5
    if not slopes:
        return torch.zeros(size, dtype=torch.float64)
    found = np.interp(at, middles[::-1], slopes[::-1])
    # Beyond the outermost middles slopes are constant: a trace of order keeps widths apart.
    return torch.from_numpy(found * (1 + 1e-6 * (size - at) / size))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (a[0] - b[0])
