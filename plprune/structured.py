"""What methods share that remove units: kinds, allocation, from scores to a plan.

Legend: U units of an axis.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from plprune.allocation import Allocation, Uniform
from plprune.budget import Budget, require_numbers
from plprune.errors import BudgetError, ConfigError
from plprune.methods.base import Method, View
from plprune.plan import Keep, Plan
from plprune.select import top_units
from plprune.spec import Axis, Spec
from plprune.stats.base import Tap

Attention = Literal["kv_group", "query_in_group", "none"]


@dataclass(frozen=True, kw_only=True)
class StructuredMethod(Method):
    """Scores every unit and keeps the best of each axis, as many as its allocation says."""

    attention: Attention = "kv_group"
    """Attention unit: a KV head with its query heads, query heads equally in all groups, or
    nothing."""
    mlp: bool = True
    """Whether MLP channels are cut."""
    allocation: Allocation = Uniform()  # noqa: RUF009 (frozen)
    """Where the budget is spent."""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: for an unknown choice, or nothing to cut.
        """
        require_numbers(self, "method")
        if self.attention not in get_args(Attention):
            raise ConfigError(
                "unknown method.attention",
                given=repr(self.attention),
                allowed=", ".join(get_args(Attention)),
            )
        if self.attention == "none" and not self.mlp:
            raise ConfigError(
                "nothing to cut", given="attention: none and mlp: false", fix="set mlp: true"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Axis kinds that are cut, attention first."""
        kinds: tuple[str, ...] = () if self.attention == "none" else (self.attention,)
        return (*kinds, "mlp") if self.mlp else kinds

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """What scores and allocation look at."""
        return tuple(dict.fromkeys((*self.looks_at(spec), *self.allocation.taps(spec, self.kinds))))

    @abstractmethod
    def looks_at(self, spec: Spec) -> tuple[Tap, ...]:
        """Statistics the scores need.

        Args:
            spec: the model.
        """

    @abstractmethod
    def scores(self, view: View) -> dict[str, Tensor]:
        """How much every unit is needed.

        Args:
            view: model and statistics.

        Returns:
            Axis name -> [U], higher stays, of all axes of `kinds`.
        """

    def axes(self, spec: Spec) -> tuple[Axis, ...]:
        """Axes that are cut, of sublayers that are there."""
        return tuple(a for a in spec.axes.values() if a.kind in self.kinds and a.size)

    def widths(self, spec: Spec, budget: Budget) -> dict[str, list[int]] | None:
        """Those the allocation knows without statistics.

        Args:
            spec: the model.
            budget: how much to keep.

        Returns:
            Units per block by axis kind.

        Raises:
            BudgetError: if no widths meet the budget, or it states widths of what is not cut.
        """
        for kind in budget.widths:
            # Kinds the model does not have are refused below, with those it has.
            if kind in spec.kinds() and kind not in self.kinds:
                raise self._not_cut(kind)
        return self.allocation.widths(spec, budget, self.kinds)

    def _not_cut(self, kind: str) -> BudgetError:
        allow = "mlp: true" if kind == "mlp" else f"attention: {kind}"
        return BudgetError(
            f"budget.widths.{kind} is given, but the method does not cut {kind}",
            given=f"attention: {self.attention}, mlp: {str(self.mlp).lower()}",
            allowed=f"widths of {' and '.join(self.kinds)}",
            fix=f"remove budget.widths.{kind}, or set {allow} in the method",
        )

    def plan(self, view: View, budget: Budget) -> Plan:
        """Score every axis and keep its best units."""
        self.widths(view.spec, budget)  # refuses what is not cut
        scores = self.scores(view)
        sizes = self.allocation.sizes(view, budget, scores, self.kinds)
        edits = []
        for name, keep in sizes.items():
            axis = view.spec.axes[name]
            if name not in scores:  # its sublayer is gone
                continue
            kept = top_units(scores[name], keep, axis.group)
            if keep < axis.size:
                edits.append(Keep(axis=name, kept=kept))
        return Plan(
            edits=tuple(edits),
            fingerprint=view.spec.fingerprint,
            method=self.label,
            hyper=self.hyper(),
            asked=budget,
            got=_got(view.spec, sizes),
            scores={name: scores[name].float() for name in sizes if name in scores},
            calibration=view.calibration,
        )

    def hyper(self) -> dict[str, Any]:
        """Those of the method and its allocation."""
        return {**super().hyper(), "allocation": self.allocation.hyper()}


def _got(spec: Spec, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Units per block (and group) by axis kind."""
    got: dict[str, list[int]] = {}
    for name, size in sizes.items():
        axis = spec.axes[name]
        got.setdefault(axis.kind, []).append(size // max(1, axis.groups))
    return {kind: tuple(widths) for kind, widths in got.items()}


def consumer_index(axis: Axis) -> tuple[str, Tensor]:
    """The linear that reads the units of an axis, and which of its columns each unit feeds.

    Args:
        axis: any.

    Returns:
        Module path, [U, w] int64.
    """
    return axis.reader.module, axis.reader.index


def unit_sums(axis: Axis, value_C: Tensor) -> Tensor:
    """Sums of a value of the consumer's columns over the columns of each unit.

    Args:
        axis: any.
        value_C: [C].

    Returns:
        [U].
    """
    return torch.as_tensor(value_C).cpu()[consumer_index(axis)[1]].sum(1)
