"""What methods share that set single weights to zero: counts, patterns, scores into masks.

Legend: R rows, C columns of a linear.
"""

# Annotations are objects here: a command line reads those of fields in modules that cannot see the
# names of this one.

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from plprune.allocation import Allocation, Uniform
from plprune.budget import Budget, require_objects
from plprune.count import count_params
from plprune.errors import BudgetError, ConfigError, PlanError
from plprune.methods.base import Method, View
from plprune.plan import Edit, Mask, Plan
from plprune.select import lowest_of_all, lowest_per_row, n_of_m
from plprune.spec import Linear, Spec

_GROUPS = re.compile(r"([1-9]\d*):([1-9]\d*)")


_MEANS = {
    "row": "equal shares of every row",
    "layer": "of every linear",
    "stripe": "of every stripe of columns",
}


def groups_of(pattern: str, others: tuple[str, ...]) -> tuple[int, int] | None:
    """N and M of a pattern `N:M`.

    Args:
        pattern: N:M, N kept of every M neighbours in a row, or one of the others.
        others: patterns without groups.

    Returns:
        N and M, or None for a pattern without groups.

    Raises:
        ConfigError: for anything else.
    """
    if pattern in others:
        return None
    found = _GROUPS.fullmatch(str(pattern))
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(
            "unknown method.pattern",
            given=repr(pattern),
            allowed=", ".join(f"{name} ({_MEANS[name]})" for name in others)
            + ", or N:M with N < M, N kept of every M neighbours, such as '2:4'",
        )
    return int(found[1]), int(found[2])


def drops(spec: Spec, budget: Budget, shares: Mapping[str, float] | None = None) -> dict[str, int]:
    """Weights every linear has to lose, so that their sum is exact.

    Args:
        spec: the model, or the part of it the budget speaks of.
        budget: `keep` of the parameters of a base.
        shares: linear -> how much of its weights goes compared with the others; default equal.

    Returns:
        Weights to drop by linear; their sum is the least that meets the budget.

    Raises:
        BudgetError: for a budget that zeros cannot meet.
    """
    if budget.keep is None or budget.widths or budget.of != "params":
        raise BudgetError(
            "zeros cannot meet this budget",
            given=f"of: {budget.of}" + ", widths" * bool(budget.widths),
            allowed="a share of parameters: {keep: 0.5, of: params}",
            fix="zeros change neither widths nor, without sparse kernels, FLOPs or the KV cache",
        )
    sizes = {name: _weights(linear) for name, linear in spec.linears.items()}
    total = sum(sizes.values())
    # Half of the prunable parameters are half of the weights: biases are never masked.
    base = total if budget.base == "prunable" else count_params(spec).of(budget.base)
    # 1e-9 forgives the last bit of the product: half of 10 weights are 5.
    due = math.ceil((1 - budget.keep) * base - 1e-9 * base)
    wanted = {name: size * (shares or {}).get(name, 1.0) for name, size in sizes.items()}
    most = sum(size for name, size in sizes.items() if wanted[name] > 0)
    if due > most:
        raise BudgetError(
            "no zeros in the linears meet the budget",
            given=f"keep {budget.keep} of {budget.base}: {due} zeros",
            allowed=f"at most {most}, all weights of the linears"
            + " that the allocation does not spare" * (most < total),
            fix="raise budget.keep, or choose budget.base: prunable",
        )
    return _rounded(wanted, sizes, due)


def _rounded(wanted: Mapping[str, float], most: Mapping[str, int], due: int) -> dict[str, int]:
    """Whole numbers in proportion to what is wanted, none above its bound, with a given sum."""
    scale = _scale(wanted, most, due)
    result, total, before = {}, 0.0, 0
    for name, value in wanted.items():
        total += min(value * scale, most[name])
        now = min(before + most[name], round(total))
        result[name], before = now - before, now
    for name in reversed(result):  # what rounding left over
        more = min(due - before, most[name] - result[name])
        result[name] += more
        before += more
    return result


def _scale(wanted: Mapping[str, float], most: Mapping[str, int], due: int) -> float:
    """Factor at which what is wanted, where it is not bound, sums to what is due."""
    bound: set[str] = set()
    while True:
        free = sum(value for name, value in wanted.items() if name not in bound)
        scale = (due - sum(most[name] for name in bound)) / free if free else 0.0
        over = {n for n, v in wanted.items() if n not in bound and v * scale > most[n]}
        if not over:
            return scale
        bound |= over


def row_drops(linear: Linear, drop: int) -> Tensor:
    """[R] int64, the same share of every row, with an exact sum."""
    ends = torch.arange(1, linear.rows + 1, dtype=torch.float64) * drop / linear.rows
    return torch.diff(ends.round().to(torch.int64), prepend=torch.zeros(1, dtype=torch.int64))


def _weights(linear: Linear) -> int:
    return linear.rows * linear.cols


@dataclass(frozen=True, kw_only=True)
class SparseMethod(Method):
    """Sets single weights to zero, block by block."""

    order = "blocks"
    patterns: ClassVar[tuple[str, ...]] = ("row", "layer")
    """Patterns without groups it knows."""
    pattern: str = "row"
    """Which weights are compared: those of a `row`, of a whole `layer` (one linear), or N:M: N stay
    of every M neighbours in a row (N is what stays)."""
    allocation: Allocation = Uniform()  # noqa: RUF009 (frozen)
    """How zeros are divided among blocks; N:M divides them itself."""

    def __post_init__(self) -> None:
        """Check the pattern.

        Raises:
            ConfigError: unless it is one, and the allocation one it can take.
        """
        require_objects("method", {Allocation: self.allocation})
        given = type(self.allocation).__name__
        if not self.allocation.of_weights:
            raise ConfigError(
                "method.allocation does not divide single weights",
                given=given,
                allowed="Uniform, OutlierWeighed",
            )
        if groups_of(self.pattern, self.patterns) and self.allocation != Uniform():
            raise ConfigError(
                f"method.pattern: {self.pattern} fixes how much of every linear goes",
                given=f"method.allocation: {given}",
                allowed="no allocation with N:M",
                fix="leave method.allocation out, or choose a pattern without groups: "
                + ", ".join(self.patterns),
            )

    def hyper(self) -> dict[str, Any]:
        """Those of the method and its allocation."""
        return {**super().hyper(), "allocation": self.allocation.hyper()}

    def due(self, spec: Spec, budget: Budget, notes: Mapping[int, float]) -> dict[str, int]:
        """Weights every linear has to lose.

        Args:
            spec: the model.
            budget: `keep` of the parameters of a base.
            notes: what the allocation knows of every block.

        Returns:
            By linear; their sum is the least that meets the budget.

        Raises:
            BudgetError: for a budget that zeros cannot meet.
        """
        even = drops(spec, budget)
        total = sum(_weights(linear) for linear in spec.linears.values())
        return drops(spec, budget, self.allocation.shares(spec, notes, sum(even.values()) / total))

    @property
    def groups(self) -> tuple[int, int] | None:
        """N and M, if weights are compared in groups."""
        return groups_of(self.pattern, self.patterns)

    def own_budget(self) -> Budget | None:
        """What an N:M pattern keeps."""
        groups = self.groups
        return None if groups is None else Budget(keep=groups[0] / groups[1], base="prunable")

    def widths(self, spec: Spec, budget: Budget) -> dict[str, list[int]] | None:
        """None: zeros leave all widths.

        Args:
            spec: the model.
            budget: how much to keep.

        Raises:
            BudgetError: for a budget this method cannot meet.
        """
        groups = self.groups
        if groups is None:
            drops(spec, budget)
            return None
        n, m = groups
        if budget.keep is None or abs(budget.keep - n / m) > 1e-9 or budget.base != "prunable":
            raise BudgetError(
                f"the pattern {self.pattern} has a budget of its own",
                given=f"keep {budget.keep} of {budget.base}",
                allowed=f"keep {n / m:g} of prunable",
                fix="leave prune.budget out",
            )
        odd = next((one for one in spec.linears.values() if one.cols % m), None)
        if odd is not None:
            raise BudgetError(
                f"the pattern {self.pattern} does not fit the model",
                given=f"{odd.name} with {odd.cols} columns",
                allowed=f"multiples of {m}",
                fix="choose another pattern",
            )
        return None

    def planned(self, view: View, budget: Budget, edits: tuple[Edit, ...]) -> Plan:
        """The plan with these edits."""
        return Plan(
            edits=edits,
            fingerprint=view.spec.fingerprint,
            method=self.label,
            hyper=self.hyper(),
            asked=budget,
            calibration=view.calibration,
        )


@dataclass(frozen=True, kw_only=True)
class ScoredSparse(SparseMethod):
    """One whose choice follows from a score of every weight."""

    def plan(self, view: View, budget: Budget) -> Plan:
        """Score every linear of the part in view and mask its worst weights."""
        due = drops(view.spec, budget)
        edits = tuple(
            Mask(module=name, keep=self.chosen(self.score(view, name), view.spec.linears[name], n))
            for name, n in due.items()
            if n > 0
        )
        return self.planned(view, budget, edits)

    @abstractmethod
    def score(self, view: View, name: str) -> Tensor:
        """How much a linear needs its weights.

        Args:
            view: model and statistics.
            name: of the linear.

        Returns:
            [R, C], higher is better.
        """

    def chosen(self, score_RC: Tensor, linear: Linear, drop: int) -> Tensor:
        """[R, C] bool, what stays of a linear that loses so many weights."""
        if not bool(torch.isfinite(score_RC).all()):
            raise PlanError(
                "scores are not finite",
                given=f"NaN or infinity in {linear.name}",
                allowed="finite weights and activations",
                fix="check the model and the calibration data for NaN; try float32",
            )
        if self.groups is not None:
            return n_of_m(score_RC, *self.groups)
        if self.pattern == "layer":
            return lowest_of_all(score_RC, drop)
        return lowest_per_row(score_RC, row_drops(linear, drop).to(score_RC.device))
