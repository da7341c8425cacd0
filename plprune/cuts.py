"""How far to cut each time: from a budget and a schedule to the cuts of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from plprune.allocate import fixed_widths, sizes_of, units_per_group
from plprune.budget import Budget
from plprune.count import price
from plprune.errors import BudgetError, ConfigError
from plprune.methods.base import Method
from plprune.schedule import Length, Schedule
from plprune.spec import Spec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One planned cut."""

    step: int
    """Optimizer steps done when it happens."""
    budget: Budget
    """What is left after it."""


def commits(every: str | int, number: int, total: int) -> bool:
    """Whether a cut makes tensors smaller.

    Args:
        every: `every`, `last`, or N for every N-th; the last one always does.
        number: of the cut, from 1.
        total: number of cuts.
    """
    return number == total or every == "every" or (isinstance(every, int) and number % every == 0)


def commits_all(every: str | int, total: int) -> bool:
    """Whether every cut makes tensors smaller at once; see `commits`."""
    return all(commits(every, number + 1, total) for number in range(total))


def step_widths(dense: int, target: int, progress: Sequence[Fraction], unit: int = 1) -> list[int]:
    """Widths after each cut on the way from dense to target (TransAct's rule when progress is i/K).

    Each cut removes `floor` of its share of what is left to remove, then rounds up to whole units
    and goes on from the rounded width.

    Args:
        dense: units before the first cut.
        target: units after the last.
        progress: share of the way after each cut.
        unit: entries of one unit (a head's width); the rule counts entries.

    Returns:
        Units after each cut.
    """
    widths, current, before = [], dense, Fraction(0)
    for share in progress:
        part = (share - before) / (1 - before)
        planned = current * unit - math.floor((current - target) * unit * part)
        current, before = math.ceil(Fraction(planned, unit)), share
        widths.append(current)
    return widths


def cuts(
    spec: Spec, method: Method, budget: Budget, schedule: Schedule, length: Length
) -> tuple[Cut, ...]:
    """The cuts of a run.

    Args:
        spec: the dense model.
        method: says whether widths follow from the budget alone.
        budget: the target.
        schedule: when.
        length: of the run.

    Returns:
        Cuts in order, the last one meeting `budget`.

    Raises:
        ConfigError: if two cuts fall on one step.
        BudgetError: if the budget cannot be met or a cut would change nothing.
    """
    points = schedule.points(length)
    for a, b in pairwise(points):
        if b.step <= a.step:
            raise ConfigError(
                "two cuts fall on one optimizer step",
                given=f"{len(points)} cuts in a run of {length.steps} steps",
                fix="train longer, spread the cuts, or use fewer",
            )
    target = method.widths(spec, budget)
    if target is None:
        return tuple(
            Cut(step=p.step, budget=method.towards(spec, budget, p.progress)) for p in points
        )
    planned = _widths(spec, target, [point.progress for point in points])
    _require_change(planned, {kind: units_per_group(spec, kind) for kind in target})
    return tuple(
        Cut(step=point.step, budget=replace(budget, keep=None, widths=widths))
        for point, widths in zip(points, planned, strict=True)
    )


def _widths(
    spec: Spec, target: Mapping[str, list[int]], progress: Sequence[Fraction]
) -> list[dict[str, int | list[int]]]:
    planned: list[dict[str, int | list[int]]] = [{} for _ in progress]
    for kind, per_block in target.items():
        dense = units_per_group(spec, kind)
        entries = [
            1 if kind == "mlp" or not a.size else a.reader.index.shape[1]
            for a in spec.of_kind(kind)
        ]
        paths = [
            step_widths(have, want, progress, unit)
            for have, want, unit in zip(dense, per_block, entries, strict=True)
        ]
        for number, widths in enumerate(zip(*paths, strict=True)):
            planned[number][kind] = list(widths)
    return planned


def _require_change(planned: Sequence[Mapping[str, object]], dense: Mapping[str, object]) -> None:
    if len(planned) == 1:
        return  # a single cut that keeps everything is a legal no-op (keep: 1.0)
    for number, (before, after) in enumerate(zip([dense, *planned[:-1]], planned, strict=True)):
        if all(before[kind] == after[kind] for kind in after):
            raise BudgetError(
                f"cut {number + 1} of {len(planned)} would change nothing",
                given=str({kind: _first(after[kind]) for kind in after}),
                fix="use fewer cuts or a smaller budget",
            )


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) else value


def require_ahead(spec: Spec, left: Sequence[Cut]) -> None:
    """Refuse cuts to more than is left, in a run that goes on with another budget.

    Args:
        spec: the model as it is.
        left: cuts that are not made yet.

    Raises:
        BudgetError: naming the first.
    """
    for cut in left:
        for kind, widths in cut.budget.widths.items():
            have = units_per_group(spec, kind)
            wanted = widths if isinstance(widths, list) else [widths] * len(have)
            if any(want > there for want, there in zip(wanted, have, strict=True)):
                raise BudgetError(
                    "the budget asks for more than earlier cuts have left",
                    given=f"{kind} {_span(wanted)} after the cut at step {cut.step}, of "
                    f"{_span(have)} that are there",
                    allowed="a budget below what the checkpoint holds",
                    fix="resume with the budget of the checkpoint or a smaller one, or from an "
                    "earlier checkpoint",
                )


def announce(spec: Spec, budget: Budget | None, planned: Sequence[Cut]) -> None:
    """Print the schedule of a run, and a warning if it misses its budget by far.

    Args:
        spec: the dense model.
        budget: that was asked for.
        planned: cuts in order.
    """
    for row in table(planned):
        log.info("%-4s %-8s %s", *row)
    if budget is not None and (note := missed(spec, budget, planned)):
        log.warning("%s", note)


def missed(spec: Spec, budget: Budget, planned: Sequence[Cut]) -> str:
    """What to say of a budget that multiples of units miss by far.

    Args:
        spec: the dense model.
        budget: that was asked for.
        planned: its cuts.

    Returns:
        A sentence; empty if the last cut comes within 5 % of the dense quantity.
    """
    widths = planned[-1].budget.widths if planned else {}
    coarse = {
        kind: step for kind, step in budget.multiple_of.items() if step > 1 and kind in widths
    }
    if budget.keep is None or not coarse or any(kind in budget.widths for kind in coarse):
        return ""
    sizes = sizes_of(spec, fixed_widths(spec, planned[-1].budget))
    got = price(spec, budget, sizes) / price(spec, budget)
    if budget.keep - got < 0.05:
        return ""
    named = ", ".join(f"{kind}: {step}" for kind, step in coarse.items())
    return (
        f"widths in multiples ({named}) leave {got:.1%} where {budget.keep:.1%} was asked for; "
        "a smaller budget.multiple_of comes closer"
    )


def table(planned: Sequence[Cut]) -> list[tuple[str, ...]]:
    """A schedule as rows of text.

    Args:
        planned: cuts in order.

    Returns:
        Header and one row a cut: number, optimizer step, widths or share kept.
    """
    rows: list[tuple[str, ...]] = [("cut", "step", "target")]
    for number, cut in enumerate(planned, start=1):
        widths = {kind: _span(value) for kind, value in cut.budget.widths.items()}
        target = (
            ", ".join(f"{kind} {text}" for kind, text in widths.items())
            or f"keep {cut.budget.keep:.4f}"
        )
        rows.append((str(number), str(cut.step), target))
    return rows


def _span(value: int | list[int]) -> str:
    numbers = value if isinstance(value, list) else [value]
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)}..{max(numbers)}"
