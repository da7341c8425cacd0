"""How many sublayers a budget lets go."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plprune.budget import Budget
from plprune.count import count_flops, count_params, kv_cache_bytes, price
from plprune.errors import BudgetError
from plprune.spec import SUBLAYERS, Axis, Spec

Unit = tuple[Axis, ...]
"""Axes of sublayers of one block that go together."""


class Goal:
    """When enough units are gone, and which may go."""

    def __init__(self, spec: Spec, budget: Budget, kind: str, units: Sequence[Unit]) -> None:
        """Set up.

        Args:
            spec: the model.
            budget: how much stays; `widths` may state the number of units.
            kind: what units are called there, `blocks` or `sublayers`.
            units: that are there.

        Raises:
            BudgetError: for other widths.
        """
        self.spec, self.budget, self.kind, self.total = spec, budget, kind, len(units)
        self.attention = [u for u in units if any(a.kind == SUBLAYERS[0] for a in u)]
        other = [name for name in budget.widths if name != kind]
        self.count = budget.widths.get(kind)
        if other or isinstance(self.count, list) or (self.count or 0) > self.total:
            raise BudgetError(
                "these widths cannot be met by removing " + kind,
                given=str(dict(budget.widths)),
                allowed=f"{kind}: a number of them that stay, 1 to {self.total}",
                fix=f"set budget.keep, or budget.widths: {{{kind}: N}}",
            )
        self.allowed = math.inf
        if budget.keep is not None:
            self.allowed = budget.keep * float(price(spec, budget)) * (1 + 1e-12)

    def met(self, gone: Sequence[Unit]) -> bool:
        """Whether what is left is within the budget."""
        within = self.count is None or self.total - len(gone) <= int(self.count)  # type: ignore[arg-type]
        return within and self._price(gone) <= self.allowed

    def may(self, gone: Sequence[Unit], unit: Unit) -> bool:
        """Whether a unit can go as well: some attention stays, and it counts for the budget."""
        now = [*gone, unit]
        if self.attention and all(one in now for one in self.attention):
            return False
        return self.count is not None or self._price(now) < self._price(gone)

    def first(self, order: Sequence[Unit]) -> list[Unit]:
        """Units that go if they go in an order, until the budget is met.

        Args:
            order: all that are there; those that may not go are passed over.

        Raises:
            BudgetError: if it is not met although nothing more can go.
        """
        gone: list[Unit] = []
        for unit in order:
            if self.met(gone):
                break
            if self.may(gone, unit):
                gone.append(unit)
        self.require(gone)
        return gone

    def require(self, gone: Sequence[Unit]) -> None:
        """Refuse a budget that is not met although nothing more can go.

        Raises:
            BudgetError: saying how far one could go.
        """
        if not self.met(gone):
            least = self._price(gone) / self._price(())
            raise BudgetError(
                "removing all that can be removed does not meet the budget",
                given=f"keep {self.budget.keep} of {self.budget.of} ({self.budget.base})",
                allowed=f"at least {least:.4f}, with one attention left",
                fix="raise budget.keep, or choose another base",
            )

    def _price(self, gone: Sequence[Unit]) -> float:
        sizes = {axis.name: 0 for unit in gone for axis in unit}
        return float(price(self.spec, self.budget, sizes))


def alike(spec: Spec, units: Sequence[Unit], context: int) -> bool:
    """Whether the model has the same parameters, FLOPs and cache whichever unit goes.

    Args:
        spec: the model.
        units: that are there.
        context: tokens, for FLOPs.
    """
    left = set()
    for unit in units:
        sizes = {axis.name: 0 for axis in unit}
        flops = count_flops(spec, sizes, context=context).model
        left.add((count_params(spec, sizes).model, flops, kv_cache_bytes(spec, sizes)))
    return len(left) < 2
