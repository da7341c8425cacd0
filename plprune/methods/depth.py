"""Depth: remove whole blocks, or their attention or MLP, that change the residual stream least.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
arXiv 2403.03853 (`influence`); Zhong et al., "BlockPruner: Fine-grained Pruning for Large Language
Models", 2024, arXiv 2406.10594 (`loss`).

With x_t what enters a unit and y_t what leaves it, over all calibration tokens t,

    influence:  BI = 1 - mean_t (x_t . y_t) / (|x_t| |y_t|)

and the units with the lowest BI go, all of one ranking; the last block is looked at before the
final norm. Of a sublayer y_t = x_t + what it adds.

    loss:       unit = argmin_u L(model without what is gone and without u)

one after the other, all candidates measured again after each removal. Units go until the budget is
met; then what went last comes back where it still fits. Of equals the later one goes.

Differences from the releases: sums and cosines in float64; the mean loss of a token where
BlockPruner takes the perplexity (its exponential: the same order); influence also of single
sublayers; the norms of a sublayer go with it; one attention always stays, because caches count
tokens there.

Not for: more than a third of the blocks without training afterwards; models whose norms stand on
the residual stream (OPT-350m).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

import torch

from plprune.budget import Budget, require_numbers
from plprune.errors import ConfigError, FamilyError, PlanError
from plprune.methods.base import Method, View
from plprune.plan import Keep, Plan
from plprune.removals import Goal, Unit, alike
from plprune.spec import SUBLAYERS, Spec
from plprune.stats.base import Tap
from plprune.stats.cosine import Cosine

Criterion = Literal["influence", "loss"]
Units = Literal["blocks", "sublayers"]


@dataclass(frozen=True, kw_only=True)
class Depth(Method):
    """Remove blocks or sublayers, by their influence on the stream or by the loss without them."""

    criterion: Criterion = "influence"
    """`influence`: one ranking from one pass (ShortGPT); `loss`: greedy, measured after each
    removal (BlockPruner)."""
    units: Units = "blocks"
    """What goes at a time: whole `blocks`, or single `sublayers` (attention or MLP)."""
    skip_first_tokens: int = 0
    """Leave the first tokens of every sequence out of the influence; 0 is faithful."""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: for an unknown choice or a negative number.
        """
        require_numbers(self, "method")
        for name, choices in (("criterion", get_args(Criterion)), ("units", get_args(Units))):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"unknown method.{name}",
                    given=repr(getattr(self, name)),
                    allowed=", ".join(choices),
                )
        if self.skip_first_tokens < 0:
            raise ConfigError(
                "negative method setting", given=str(self.skip_first_tokens), allowed=">= 0"
            )

    @property
    def compensable(self) -> bool:
        """No: what reads from a sublayer goes with it."""
        return False

    def units_of(self, spec: Spec) -> tuple[Unit, ...]:
        """What can go, in the order of the model.

        Args:
            spec: the model.

        Raises:
            FamilyError: if sublayers of this architecture cannot be removed.
        """
        there = [axis for axis in spec.axes.values() if axis.removable and axis.size]
        if not there:
            raise FamilyError(
                "blocks of this model cannot be removed",
                given=f"family {spec.family}",
                allowed="norms in front of attention and MLP, and a family that says where",
                fix="cut widths instead, or see docs/add_a_family.md",
            )
        if self.units == "sublayers":
            return tuple((axis,) for axis in there)
        blocks = dict.fromkeys(axis.block for axis in there)
        return tuple(tuple(a for a in there if a.block == block) for block in blocks)

    def widths(self, spec: Spec, budget: Budget) -> dict[str, list[int]] | None:
        """None: which units go depends on data.

        Args:
            spec: the model.
            budget: how much to keep.

        Raises:
            BudgetError: for widths of other things than units, or less than what cannot go.
        """
        units = self.units_of(spec)
        Goal(spec, budget, self.units, units).first(units)
        return None

    def sizes_like(self, spec: Spec, budget: Budget) -> dict[str, int] | None:
        """The model without its last units, if every unit is like every other."""
        units = self.units_of(spec)
        if not alike(spec, units, budget.context):
            return None
        gone = Goal(spec, budget, self.units, units).first(units[::-1])
        return {axis.name: 0 for unit in gone for axis in unit}

    def towards(self, spec: Spec, budget: Budget, progress: Fraction) -> Budget:
        """Equal shares of what goes, in whole units where the budget counts them."""
        part = budget if budget.keep is None else super().towards(spec, budget, progress)
        count = budget.widths.get(self.units)
        if not isinstance(count, int):
            return part
        total = len(self.units_of(spec))
        left = math.ceil(total - progress * (total - count))
        return replace(part, widths={**budget.widths, self.units: left})

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """The residual stream around every unit; nothing for losses."""
        if self.criterion == "loss":
            return ()
        return tuple(self._tap(spec, unit) for unit in self.units_of(spec))

    def _tap(self, spec: Spec, unit: Unit) -> Tap:
        axis = unit[0]
        if self.units == "blocks":
            return Tap(module=f"{spec.stack}.{axis.block}", stat=Cosine, side="stream")
        enters, adds = axis.stream
        return Tap(module=enters, stat=Cosine, side="stream", until=adds)

    def plan(self, view: View, budget: Budget) -> Plan:
        """Remove units until the budget is met."""
        units = self.units_of(view.spec)
        goal = Goal(view.spec, budget, self.units, units)
        choose = self._by_influence if self.criterion == "influence" else self._by_loss
        gone, score_of = choose(view, units, goal)
        for unit in reversed(list(gone)):
            rest = [other for other in gone if other is not unit]
            gone = rest if goal.met(rest) else gone
        sizes = {axis.name: 0 for unit in gone for axis in unit}
        found = view.spec.axes
        none = torch.zeros(0, dtype=torch.int64)
        return Plan(
            edits=tuple(Keep(axis=name, kept=none) for name in found if name in sizes),
            fingerprint=view.spec.fingerprint,
            method=self.label,
            hyper=self.hyper(),
            asked=budget,
            got={
                kind: tuple(sizes.get(axis.name, axis.size) for axis in view.spec.of_kind(kind))
                for kind in SUBLAYERS
            },
            scores={
                axis.name: torch.tensor([value], dtype=torch.float32)
                for unit, value in zip(units, score_of, strict=False)
                for axis in unit
            },
            calibration=view.calibration,
        )

    def _by_influence(
        self, view: View, units: Sequence[Unit], goal: Goal
    ) -> tuple[list[Unit], list[float]]:
        influence = []
        for unit in units:
            seen = view.stats[self._tap(view.spec, unit)]
            assert isinstance(seen, Cosine), "taps name their class"
            influence.append(float(seen.influence))
        # Of equals the lower index stays, as everywhere.
        order = sorted(range(len(units)), key=lambda place: (influence[place], -place))
        return goal.first([units[place] for place in order]), influence

    def _by_loss(
        self, view: View, units: Sequence[Unit], goal: Goal
    ) -> tuple[list[Unit], list[float]]:
        gone: list[Unit] = []
        alone: list[float] = []
        while not goal.met(gone):
            left = [unit for unit in units if unit not in gone and goal.may(gone, unit)]
            if not left:
                goal.require(gone)
            losses = _measured(view, gone, left)
            alone = alone or (losses if len(left) == len(units) else [])
            best = min(range(len(left)), key=lambda place: (losses[place], -place))
            gone.append(left[best])
        return gone, alone


def _measured(view: View, gone: Sequence[Unit], candidates: Sequence[Unit]) -> list[float]:
    """Loss without what is gone and without each candidate."""
    if view.losses is None:
        raise ConfigError(
            "losses cannot be measured here",
            given="criterion: loss, and no calibration batches",
            allowed="prune.statistics.source: fresh or fixed",
            fix="set one of those, or criterion: influence",
        )
    names = [[axis.name for axis in unit] for unit in candidates]
    losses = view.losses([axis.name for unit in gone for axis in unit], names)
    wrong = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
    if wrong:
        raise PlanError(
            "losses are not finite",
            given=f"{losses[wrong[0]]} without {', '.join(names[wrong[0]])}",
            allowed="finite losses",
            fix="check the model and the calibration data for NaN; try float32",
        )
    return losses
