"""From sizes that are nearly right to sizes that meet a budget and leave no unit unused."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from torch import Tensor

from plprune.allocate import fixed_widths, sizes_of
from plprune.budget import Budget
from plprune.count import price
from plprune.errors import BudgetError
from plprune.spec import Spec


def repaired(
    spec: Spec, budget: Budget, sizes: Mapping[str, int], order: Mapping[str, Tensor], target: float
) -> dict[str, int]:
    """Take the worst units away until a budget is met, then give the best back while it holds.

    Args:
        spec: the model.
        budget: names quantity, base and multiples.
        sizes: axis name -> units, on the multiples.
        order: axis name -> [U] scores, best first, of the axes that may change.
        target: what the budget allows.

    Returns:
        Sizes whose price is within the target, and to which no multiple of any axis can be added.

    Raises:
        BudgetError: if one multiple in every axis is too much.
    """
    result = dict(sizes)
    steps = {n: spec.axes[n].groups * budget.multiple_of.get(spec.axes[n].kind, 1) for n in order}
    allowed = target * (1 + 1e-12)
    worst = [(float(order[n][result[n] - steps[n]]), n) for n in order if result[n] > steps[n]]
    heapq.heapify(worst)
    while price(spec, budget, result) > allowed:
        if not worst:
            raise _unmet(spec, budget, result)
        _, name = heapq.heappop(worst)
        result[name] = _below(result[name], steps[name])
        if result[name] > steps[name]:
            heapq.heappush(worst, (float(order[name][result[name] - steps[name]]), name))
    best = [(-float(order[n][result[n]]), n) for n in order if result[n] < spec.axes[n].size]
    heapq.heapify(best)
    while best:
        _, name = heapq.heappop(best)
        wider = min(result[name] + steps[name], spec.axes[name].size)
        if price(spec, budget, {**result, name: wider}) > allowed:
            continue  # nor will it fit when others have grown
        result[name] = wider
        if wider < spec.axes[name].size:
            heapq.heappush(best, (-float(order[name][wider]), name))
    return result


def require_possible(spec: Spec, budget: Budget, kinds: Sequence[str]) -> None:
    """Refuse a budget that `repaired` would, before anything is known of the units.

    Args:
        spec: the model.
        budget: how much stays.
        kinds: axis kinds that are cut.

    Raises:
        BudgetError: if one multiple in every axis is too much, or nothing says how much stays.
    """
    least = sizes_of(spec, fixed_widths(spec, budget))
    for axis in spec.axes.values():
        if axis.kind in kinds and axis.kind not in budget.widths:
            least[axis.name] = min(axis.size, step_of(spec, axis.name, budget))
    if price(spec, budget, least) > target_of(spec, budget) * (1 + 1e-12):
        raise _unmet(spec, budget, least)


def _unmet(spec: Spec, budget: Budget, least: Mapping[str, int]) -> BudgetError:
    floor = price(spec, budget, least) / price(spec, budget)
    return BudgetError(
        "no widths meet the budget",
        given=f"keep {budget.keep} of {budget.of} ({budget.base})",
        allowed=f"at least {floor:.4f} with the fewest units budget.multiple_of allows",
        fix="raise budget.keep, lower budget.multiple_of, or choose another base",
    )


def _below(size: int, step: int) -> int:
    """The next multiple below; a full width need not be one."""
    return (size - 1) // step * step


def step_of(spec: Spec, name: str, budget: Budget) -> int:
    """Units by which the width of an axis changes: its multiple, in every group.

    Args:
        spec: the model.
        name: of the axis.
        budget: states multiples.
    """
    axis = spec.axes[name]
    return axis.groups * budget.multiple_of.get(axis.kind, 1)


def target_of(spec: Spec, budget: Budget) -> float:
    """What a budget allows, in its own quantity.

    Raises:
        BudgetError: without `keep`.
    """
    if budget.keep is None:
        raise BudgetError(
            "this allocation needs a share to keep",
            given="widths alone",
            fix="set budget.keep, or use the allocation Uniform with widths",
        )
    return float(budget.keep * price(spec, budget))
