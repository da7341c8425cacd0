"""Blocks with more outliers lose less (OWL).

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to
High Sparsity", ICML 2024, arXiv 2310.05175.

    A_ij = |W_ij| * |x_j|_2                     of all linears of a block together
    D_l  = share of the A of block l that are larger than M times their mean
    S_l  = S - lambda * (D_l - mean D) / max |D - mean D|

S is what goes in all, S_l what goes of a block. D is taken on the model before anything goes.

Differences from the release: it stretches the S_l to a width of 2 lambda around a mean of S, so
that of a lopsided D some lie further than lambda from S. Here none does; where the release goes
further, a larger `spread` does. Blocks count by their weights, so that S is met where they differ.

Legend: R rows, C columns of a linear, U units of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plprune.allocate import fixed_widths, sizes_of
from plprune.allocation import Allocation, Sizes
from plprune.budget import Budget, require_numbers
from plprune.count import price
from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.readers import readers
from plprune.repair import repaired, step_of, target_of
from plprune.spec import Side, Spec
from plprune.stats.base import Tap
from plprune.stats.energy import Energy, weighed

_SIDES: tuple[Side, Side] = ("out", "in")
"""Ends of a linear, in the order of its weight's dimensions."""


@dataclass(frozen=True, kw_only=True)
class OutlierWeighed(Allocation):
    """What a block loses lies around the budget, by its share of outliers; see the module."""

    threshold: float = 5.0
    """M: how many times the mean of a block an outlier is (the paper: 5 for LLaMA; 3 to 10)."""
    spread: float = 0.08
    """Lambda: how far a block may be from the share that goes (the paper: 0.08 at 70 %). Of single
    weights no more than what goes in all, nor than half of what stays."""

    needs_data: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the setting.
        """
        require_numbers(self, "allocation")
        if not (math.isfinite(self.threshold) and self.threshold > 0 and 0 <= self.spread < 1):
            raise ConfigError(
                "allocation.threshold or allocation.spread out of range",
                given=f"{self.threshold}, {self.spread}",
                allowed="a threshold above 0 (5 in the paper), a spread in [0, 1) (0.08)",
            )

    def taps(self, spec: Spec, kinds: tuple[str, ...] = ()) -> tuple[Tap, ...]:
        """Energy once for linears that read the same activation."""
        del kinds
        return tuple(Tap(module=names[0], stat=Energy) for names in readers(spec))

    def notes(self, view: View) -> dict[int, float]:
        """D of every block in view."""
        blocks = sorted({linear.block for linear in view.spec.linears.values()})
        return {block: self._outliers(view, block) for block in blocks}

    def _outliers(self, view: View, block: int) -> float:
        names = tuple(view.spec.of_block(block).linears)
        count, total = 0, 0.0
        for score_RC in _scores(view, names):
            count += score_RC.numel()
            total += float(score_RC.sum(dtype=torch.float64))
        limit = self.threshold * total / count
        # Once more instead of keeping a block's scores, which are as large as its weights.
        return sum(int((score_RC > limit).sum()) for score_RC in _scores(view, names)) / count

    def tilts(self, spec: Spec, notes: Mapping[int, float]) -> dict[int, float]:
        """How many spreads more than the average a block keeps.

        Args:
            spec: the model.
            notes: D by block.

        Returns:
            Numbers in [-1, 1] by block, weighed by the weights of the blocks a mean of 0, the
            farthest at an end; all 0 if blocks have equally many outliers.
        """
        weights = dict.fromkeys(notes, 0)
        for linear in spec.linears.values():
            masked = (spec.dead.get((linear.name, side)) for side in _SIDES)
            rows, cols = (0 if dead is None else int(dead.sum()) for dead in masked)
            weights[linear.block] += (linear.rows - rows) * (linear.cols - cols)
        mean = sum(notes[b] * n for b, n in weights.items()) / sum(weights.values())
        most = max(abs(value - mean) for value in notes.values())
        # One entry of 1e11 is more than this; rounding of the mean is less.
        return {b: (value - mean) / most if most > 1e-12 else 0.0 for b, value in notes.items()}

    def shares(self, spec: Spec, notes: Mapping[int, float], drop: float) -> dict[str, float]:
        """S_l, for every linear of block l."""
        spread = min(self.spread, drop, (1 - drop) / 2)
        tilts = self.tilts(spec, notes)
        return {name: drop - spread * tilts[linear.block] for name, linear in spec.linears.items()}

    def sizes(
        self, view: View, budget: Budget, scores: Mapping[str, Tensor], kinds: tuple[str, ...]
    ) -> Sizes:
        """Widths whose shares of the dense ones lie around one that meets the budget.

        As with `Uniform`, attention is rounded up to whole units and the last kind makes up for it,
        if it can.
        What its multiples leave goes to the axes that are farthest below what they should have.
        """
        spec = view.spec
        target = target_of(spec, budget)
        tilts = self.tilts(spec, self.notes(view))
        sizes = sizes_of(spec, fixed_widths(spec, budget))
        free = [kind for kind in kinds if kind not in budget.widths]
        order = {}
        while free:
            wanted = self._wanted(spec, budget, (sizes, tuple(free), tilts), target)
            kind = free.pop(0)
            axes = spec.of_kind(kind)
            least = {a.name: step_of(spec, a.name, budget) for k in free for a in spec.of_kind(k)}
            up, down = (
                {a.name: _whole(wanted[a.name], a.size, step_of(spec, a.name, budget), away)
                 for a in axes}
                for away in (math.ceil, math.floor)
            )  # fmt: skip
            fits = price(spec, budget, {**sizes, **up, **least}) <= target
            sizes |= up if free and fits else down
            for axis in axes:
                units_U = torch.arange(axis.size, dtype=torch.float64)
                order[axis.name] = (wanted[axis.name] - units_U) / axis.dense_size
        return repaired(spec, budget, sizes, order, target)

    def _wanted(
        self,
        spec: Spec,
        budget: Budget,
        given: tuple[Sizes, tuple[str, ...], Mapping[int, float]],
        target: float,
    ) -> dict[str, float]:
        """Units of the axes of free kinds, not whole, that meet the target with sizes so far."""
        sizes, kinds, tilts = given
        axes = [axis for kind in kinds for axis in spec.of_kind(kind)]
        low, high = -self.spread, 1 + self.spread
        for _ in range(60):
            middle = (low + high) / 2
            wanted = {
                axis.name: min(
                    float(axis.size),
                    max(0.0, middle + self.spread * tilts[axis.block]) * axis.dense_size,
                )
                for axis in axes
            }
            fits = price(spec, budget, {**sizes, **wanted}) <= target * (1 + 1e-12)
            low, high = (middle, high) if fits else (low, middle)
        return wanted


def _whole(wanted: float, size: int, step: int, rounded: Callable[[float], int]) -> int:
    """The next multiple in a direction, at least one and no more than there is."""
    # 1e-9 forgives the last bit of the bisection: 3.0000000001 heads are three.
    bit = -1e-9 if rounded is math.ceil else 1e-9
    return min(size, max(1, rounded(wanted / step + bit)) * step)


def _scores(view: View, names: tuple[str, ...]) -> Iterator[Tensor]:
    """A of some linears, one after the other; what is masked is not there."""
    for name in names:
        score_RC = weighed(view.weight(name), view.seen(name, Energy))
        for dim, side in enumerate(_SIDES):
            dead = view.spec.dead.get((name, side))
            if dead is not None:
                alive = torch.nonzero(~dead)[:, 0].to(score_RC.device)
                score_RC = score_RC.index_select(dim, alive)
        yield score_RC
