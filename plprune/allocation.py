"""Where a budget is spent: the same width everywhere, one threshold for all, or by block.

Legend: U units of an axis, R rows and C columns of a linear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from plprune.allocate import fixed_widths, sizes_of, uniform
from plprune.budget import Budget, require_numbers
from plprune.count import price
from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.repair import repaired, require_possible, step_of, target_of
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.stats.losses import LossCurve, marginal_losses

Sizes = dict[str, int]
"""Axis name -> units kept, over all groups."""


class Allocation(ABC):
    """How a budget is divided. Subclasses are frozen dataclasses."""

    needs_data: ClassVar[bool] = False
    """Whether it looks at calibration data."""
    of_weights: ClassVar[bool] = False
    """Whether it also divides single weights that become zero."""

    sequences: int | None = None
    """How many calibration sequences `measured` statistics are of; None: all."""

    def taps(self, spec: Spec, kinds: tuple[str, ...] = ()) -> tuple[Tap, ...]:
        """Statistics it needs besides the method's.

        Args:
            spec: the model.
            kinds: axis kinds that are cut; none where single weights become zero.
        """
        del spec, kinds
        return ()

    def widths(
        self, spec: Spec, budget: Budget, kinds: tuple[str, ...]
    ) -> dict[str, list[int]] | None:
        """Widths that follow from the budget alone; None if they depend on statistics.

        Raises:
            BudgetError: if no widths meet it.
        """
        require_possible(spec, budget, kinds)
        return None

    @abstractmethod
    def sizes(
        self, view: View, budget: Budget, scores: Mapping[str, Tensor], kinds: tuple[str, ...]
    ) -> Sizes:
        """Units every axis keeps.

        Args:
            view: model and statistics.
            budget: how much stays in all.
            scores: axis name -> [U], higher stays.
            kinds: axis kinds that are cut, the finest last.

        Returns:
            Units by axis; their price meets the budget, and one more of the finest would not.

        Raises:
            BudgetError: if no widths meet it.
        """

    def notes(self, view: View) -> dict[int, float]:
        """What it has to know of the dense model to divide single weights: a number a block.

        Args:
            view: blocks of the dense model, and what `taps` saw in them.
        """
        del view
        return {}

    def shares(
        self, spec: Spec, notes: Mapping[int, float], drop: float
    ) -> dict[str, float] | None:
        """For single weights, where `of_weights`: how much of every linear goes.

        Args:
            spec: the model.
            notes: of all its blocks.
            drop: share of all weights that goes.

        Returns:
            By linear, in proportion; None for equal shares.
        """
        del spec, notes, drop
        return None

    def hyper(self) -> dict[str, Any]:
        """Settings as plain values."""
        own = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        return {"class": type(self).__name__, **own}


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """The same width in every block, or in every one that is not spared."""

    of_weights: ClassVar[bool] = True

    spare: tuple[int, ...] = (0, 0)
    """Blocks at the start and at the end that are not cut."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: unless they are two counts.
        """
        if len(self.spare) != 2 or min(self.spare) < 0:
            raise ConfigError(
                "allocation.spare out of range",
                given=str(self.spare),
                allowed="two numbers of blocks, such as [3, 1]",
            )

    def widths(self, spec: Spec, budget: Budget, kinds: tuple[str, ...]) -> dict[str, list[int]]:
        """From the budget alone."""
        if budget.keep is None:
            return fixed_widths(spec, budget)
        return uniform(spec, budget, kinds, self._spared(spec))

    def _spared(self, spec: Spec) -> set[int]:
        """Numbers of blocks that are not cut."""
        first, last = self.spare
        total = len(spec.blocks)
        if first + last >= total:
            raise ConfigError(
                "allocation.spare leaves no block",
                given=f"{list(self.spare)} of {total} blocks",
                allowed=f"fewer than {total} in all",
            )
        return {*range(first), *range(total - last, total)}

    def sizes(
        self, view: View, budget: Budget, scores: Mapping[str, Tensor], kinds: tuple[str, ...]
    ) -> Sizes:
        """Those of `widths`."""
        del scores
        return sizes_of(view.spec, self.widths(view.spec, budget, kinds))

    def shares(
        self, spec: Spec, notes: Mapping[int, float], drop: float
    ) -> dict[str, float] | None:
        """Equal ones, and nothing of spared blocks."""
        del notes, drop
        spared = self._spared(spec)
        return {n: float(one.block not in spared) for n, one in spec.linears.items()}


@dataclass(frozen=True, kw_only=True)
class GlobalThreshold(Allocation):
    """Keep whatever scores above one threshold, wherever it is."""

    least: float = 0.0
    """Share of every axis that stays whatever it scores (at least one unit does)."""

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: unless it is a share.
        """
        require_numbers(self, "allocation")
        if not 0 <= self.least <= 1:
            raise ConfigError(
                "allocation.least out of range", given=str(self.least), allowed="0 to 1"
            )

    def sizes(
        self, view: View, budget: Budget, scores: Mapping[str, Tensor], kinds: tuple[str, ...]
    ) -> Sizes:
        """Move the threshold until the budget is met, then fill it up."""
        spec = view.spec
        target = target_of(spec, budget)
        fixed = sizes_of(spec, fixed_widths(spec, budget))
        free = {
            axis.name: scores[axis.name].double().sort(descending=True).values
            for axis in spec.axes.values()
            if axis.kind in kinds and axis.name not in fixed and axis.size
        }
        values = torch.unique(torch.cat([*free.values()]))
        low, high, best = 0, len(values), None
        while low < high:  # smallest threshold that meets the budget
            middle = (low + high) // 2
            sizes = fixed | {
                n: self._above(spec, n, s, values[middle], budget) for n, s in free.items()
            }
            if price(spec, budget, sizes) <= target * (1 + 1e-12):
                best, high = sizes, middle
            else:
                low = middle + 1
        if best is None:
            best = fixed | {n: self._above(spec, n, s, torch.inf, budget) for n, s in free.items()}
        return repaired(spec, budget, best, free, target)

    def _above(
        self, spec: Spec, name: str, sorted_U: Tensor, threshold: Any, budget: Budget
    ) -> int:
        axis = spec.axes[name]
        step = step_of(spec, name, budget)
        most = axis.size
        least = max(step, -(-int(self.least * most + 1 - 1e-9) // step) * step)
        count = int((sorted_U > threshold).sum())
        return min(most, max(least, round(count / step) * step))


@dataclass(frozen=True, kw_only=True)
class MeasuredLoss(Allocation):
    """Spend the budget where the loss, measured on the calibration set, says it is needed.

    Every axis is cut alone at a few widths, and compensated if cuts are. The convex hull of what
    that costs gives every unit a price in loss, and one threshold for all decides: loss for
    parameters (or what the budget counts). Costs of several cuts are taken to add.
    """

    needs_data: ClassVar[bool] = True
    least: float = 0.0
    """Share of every axis that stays whatever it costs (at least one unit does)."""
    sequences: int | None = 8
    """How many calibration sequences losses are measured on, half a pass a width; None: all."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the setting.
        """
        GlobalThreshold(least=self.least)
        if self.sequences is not None and self.sequences < 1:
            raise ConfigError(
                "allocation.sequences out of range", given=str(self.sequences), allowed=">= 1, null"
            )

    def taps(self, spec: Spec, kinds: tuple[str, ...] = ()) -> tuple[Tap, ...]:
        """Losses, for every linear that reads units that can go."""
        axes = (axis for axis in spec.axes.values() if axis.kind in kinds and axis.size)
        cut = dict.fromkeys(axis.reader.module for axis in axes)
        return tuple(Tap(module=name, stat=LossCurve) for name in cut)

    def sizes(
        self, view: View, budget: Budget, scores: Mapping[str, Tensor], kinds: tuple[str, ...]
    ) -> Sizes:
        """One threshold over the marginal losses of all units."""
        spec = view.spec
        fixed = fixed_widths(spec, budget)
        worth = {}
        for axis in spec.axes.values():
            if axis.kind in kinds and axis.kind not in fixed and axis.size:
                curve = view.stats[Tap(module=axis.reader.module, stat=LossCurve)]
                assert isinstance(curve, LossCurve), "taps name their class"
                whole = price(spec, budget)
                unit = (whole - price(spec, budget, {axis.name: axis.size / 2})) / (axis.size / 2)
                worth[axis.name] = marginal_losses(curve, axis.size) / unit
        return GlobalThreshold(least=self.least).sizes(view, budget, worth, kinds)
