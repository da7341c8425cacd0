"""From a budget to widths: the same width in every block, hit exactly up to one unit."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping

from plprune.budget import Budget
from plprune.count import price
from plprune.errors import BudgetError
from plprune.spec import Spec

Widths = dict[str, list[int]]
"""Axis kind -> units kept in each block (for `query_in_group`: per KV group)."""


def units_per_group(spec: Spec, kind: str) -> list[int]:
    """Units of a kind in each block (and group), 0 where the sublayer is gone."""
    return [axis.size // max(1, axis.groups) for axis in spec.of_kind(kind)]


def sizes_of(spec: Spec, widths: Mapping[str, list[int]]) -> dict[str, int]:
    """Axis sizes (over all groups) for widths given per block.

    Args:
        spec: the model.
        widths: units per block (and per group for grouped kinds) by axis kind.

    Returns:
        Axis name -> units kept.
    """
    sizes: dict[str, int] = {}
    kv = widths.get("kv_group")
    for kind, per_block in widths.items():
        for axis in spec.of_kind(kind):
            # Query heads are counted per KV group that is present before this cut.
            sizes[axis.name] = per_block[axis.block] * axis.groups
    assert kv is None or len(kv) == len(spec.blocks), "one width per block"
    return sizes


def fixed_widths(spec: Spec, budget: Budget) -> Widths:
    """Widths the budget states, checked against the model.

    Args:
        spec: the model.
        budget: its `widths` hold one number or one per block.

    Returns:
        One width per block for every stated kind.

    Raises:
        BudgetError: for an unknown kind, a wrong list length, or a width larger than the model has.
    """
    result: Widths = {}
    for field, kinds in (("widths", budget.widths), ("multiple_of", budget.multiple_of)):
        for kind in kinds:
            if kind not in spec.kinds():
                near = difflib.get_close_matches(kind, spec.kinds(), n=1)
                raise BudgetError(
                    f"unknown axis kind budget.{field}.{kind}",
                    given=kind,
                    allowed=", ".join(spec.kinds()),
                    fix=f"did you mean {near[0]}?" if near else "name one that the model has",
                )
    for kind, given in budget.widths.items():
        have = units_per_group(spec, kind)
        # A single number leaves alone the blocks that have no such sublayer.
        per_block = list(given) if isinstance(given, list) else [given if n else 0 for n in have]
        if len(per_block) != len(have):
            raise BudgetError(
                f"budget.widths.{kind} has the wrong length",
                given=f"{len(per_block)} numbers",
                allowed=f"one number, or one for each of {len(have)} blocks",
            )
        for block, (width, most) in enumerate(zip(per_block, have, strict=True)):
            if not min(1, most) <= width <= most:
                raise BudgetError(
                    f"{kind} width {width} requested for block {block}",
                    given=str(width),
                    allowed=f"1..{most}",
                    fix=f"set budget.widths.{kind} within what the model has",
                )
        result[kind] = per_block
    return result


def uniform(
    spec: Spec, budget: Budget, kinds: tuple[str, ...], spare: Collection[int] = ()
) -> Widths:
    """Equal widths in every block that meet a budget.

    Attention and MLP lose the same share (TransAct's neutral split); attention widths are rounded
    up to whole units, then the MLP takes the largest width on its multiple that stays within the
    budget.

    Args:
        spec: a model whose blocks are all alike.
        budget: `keep` with quantity and base, `widths` that are fixed, `multiple_of`.
        kinds: axis kinds to solve for, attention kinds first.
        spare: numbers of blocks that keep all units of those kinds.

    Returns:
        Widths by kind.

    Raises:
        BudgetError: if no widths meet the budget.
    """
    widths = fixed_widths(spec, budget)
    free = [kind for kind in kinds if kind not in widths]
    if budget.keep is None or not free:
        _require_within(spec, budget, widths)
        return widths
    for kind in free:
        if len(set(units_per_group(spec, kind)) - {0}) > 1:
            raise BudgetError(
                f"blocks differ in {kind}, a uniform budget cannot be split",
                given=str(units_per_group(spec, kind)),
                fix=f"state budget.widths.{kind} block by block",
            )
    target = budget.keep * price(spec, budget)
    share = _equal_share(spec, budget, widths, free, target, spare)
    *rounded_up, last = free
    chosen = {
        k: _round_up(share, max(units_per_group(spec, k)), budget.multiple_of.get(k, 1))
        for k in rounded_up
    }
    while True:
        trial = {**widths, **{k: _spread(spec, k, width, spare) for k, width in chosen.items()}}
        width = _largest(spec, budget, trial, last, target, spare)
        if width is not None:
            return {**trial, last: _spread(spec, last, width, spare)}
        # The last kind alone cannot make up for rounding up: give back one multiple of attention.
        below = {k: _next_below(width, budget.multiple_of.get(k, 1)) for k, width in chosen.items()}
        shrinkable = [kind for kind, width in below.items() if width > 0]
        if not shrinkable:
            raise _impossible(spec, budget, trial, last, spare)
        chosen[shrinkable[0]] = below[shrinkable[0]]


def _equal_share(
    spec: Spec,
    budget: Budget,
    widths: Widths,
    free: list[str],
    target: float,
    spare: Collection[int],
) -> float:
    """The share of units, equal for all free kinds, whose price is the target."""
    low, high = 0.0, 1.0
    fixed = sizes_of(spec, widths)
    for _ in range(60):
        middle = (low + high) / 2
        soft = {
            axis.name: axis.size * (1 if axis.block in spare else middle)
            for kind in free
            for axis in spec.of_kind(kind)
        }
        low, high = (
            (middle, high) if price(spec, budget, {**fixed, **soft}) <= target else (low, middle)
        )
    return low


def _spread(spec: Spec, kind: str, width: int, spare: Collection[int]) -> list[int]:
    """A width in every block but those that keep all they have."""
    have = enumerate(units_per_group(spec, kind))
    return [dense if block in spare or not dense else width for block, dense in have]


def _largest(
    spec: Spec, budget: Budget, widths: Widths, kind: str, target: float, spare: Collection[int]
) -> int | None:
    """Largest width of a kind, on its multiple, whose price stays within the target."""
    multiple, most = budget.multiple_of.get(kind, 1), max(units_per_group(spec, kind))

    def fits(width: int) -> bool:
        sizes = sizes_of(spec, {**widths, kind: _spread(spec, kind, width, spare)})
        return bool(price(spec, budget, sizes) <= target * (1 + 1e-12))

    # The full width is always allowed, also where it is no multiple.
    if fits(most):
        return most
    low, high, best = 1, most // multiple, None
    while low <= high:
        middle = (low + high) // 2
        if fits(middle * multiple):
            best, low = middle * multiple, middle + 1
        else:
            high = middle - 1
    return best


def _round_up(share: float, most: int, multiple: int) -> int:
    # 1e-9 forgives the last bit of the bisection: 3.0000000001 heads are three heads.
    # The full width is always allowed, also where it is no multiple.
    return min(most, max(multiple, math.ceil(share * most / multiple - 1e-9) * multiple))


def _next_below(width: int, multiple: int) -> int:
    return (width - 1) // multiple * multiple


def _require_within(spec: Spec, budget: Budget, widths: Widths) -> None:
    if budget.keep is None:
        return
    got = price(spec, budget, sizes_of(spec, widths)) / price(spec, budget)
    if got > budget.keep * (1 + 1e-12):
        raise BudgetError(
            "the stated widths exceed the budget",
            given=f"{got:.4f} of {budget.of} ({budget.base})",
            allowed=f"at most {budget.keep}",
            fix="lower the widths or raise budget.keep",
        )


def _impossible(
    spec: Spec, budget: Budget, widths: Widths, kind: str, spare: Collection[int]
) -> BudgetError:
    fewest = min(budget.multiple_of.get(kind, 1), max(units_per_group(spec, kind)))
    least = {**widths, kind: _spread(spec, kind, fewest, spare)}
    floor = price(spec, budget, sizes_of(spec, least)) / price(spec, budget)
    return BudgetError(
        "no widths meet the budget",
        given=f"keep {budget.keep} of {budget.of} ({budget.base})",
        allowed=f"at least {floor:.4f} with the fewest units budget.multiple_of allows",
        fix="raise budget.keep, lower budget.multiple_of, choose another base, or remove blocks",
    )
