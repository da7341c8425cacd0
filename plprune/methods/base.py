"""What every method is: taps it needs, a plan it returns.

Legend: R rows, C columns.
"""

# Annotations are objects here: a command line reads those of fields in modules that cannot see the
# names of this one.

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from plprune.budget import Budget
from plprune.plan import Plan
from plprune.readers import readers
from plprune.spec import Spec
from plprune.stats.base import Stat, Tap

S = TypeVar("S", bound=Stat)

Losses = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
"""Of (axes of sublayers that are gone, candidates of axes of one block each): the mean loss of a
token without the former and each of the latter in turn; equal on all ranks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Everything a method may look at."""

    spec: Spec
    """The model, in the coordinates of its tensors."""
    stats: Mapping[Tap, Stat]
    """What its taps saw, summed over ranks."""
    weight: Callable[[str], Tensor]
    """Module path -> [R, C] weight the model computes with, adapters included; read-only."""
    bias: Callable[[str], Tensor | None]
    """Module path -> [R] bias, None without one; read-only."""
    calibration: str = ""
    """sha256 of the calibration tokens."""
    losses: Losses | None = None
    """Measures models without some sublayers on the calibration tokens; collective on all ranks.
    None: there is nothing to measure on."""

    def seen(self, name: str, stat: type[S]) -> S:
        """Statistic of what a linear reads.

        Args:
            name: of the linear; a tap at any linear that reads the same will do.
            stat: which.

        Returns:
            The sums.
        """
        exact = self.stats.get(Tap(module=name, stat=stat))
        if exact is not None:
            assert isinstance(exact, stat), "taps name their class"
            return exact
        together = next(names for names in readers(self.spec) if name in names)
        taps = (Tap(module=one, stat=stat) for one in together)
        found = next(self.stats[tap] for tap in taps if tap in self.stats)
        assert isinstance(found, stat), "taps name their class"
        return found


class Method(ABC):
    """A pruning method. Subclasses are frozen dataclasses whose fields are the hyper-parameters."""

    order: ClassVar[Literal["whole", "blocks"]] = "whole"
    """Observed on the whole model at once, or block by block."""
    skip_first_tokens: int = 0
    """Tokens at the start of each sequence that statistics ignore."""

    @abstractmethod
    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """Statistics the method needs.

        Args:
            spec: the model.

        Returns:
            Taps; empty if it needs none.
        """

    @abstractmethod
    def plan(self, view: View, budget: Budget) -> Plan:
        """Decide; changes nothing.

        Args:
            view: model and statistics.
            budget: how much to keep.

        Returns:
            The plan.
        """

    def widths(self, spec: Spec, budget: Budget) -> dict[str, list[int]] | None:
        """Widths that follow from the budget alone.

        Args:
            spec: the model.
            budget: how much to keep.

        Returns:
            Units per block by axis kind, or None if they depend on statistics.
        """
        del spec, budget
        return None

    def sizes_like(self, spec: Spec, budget: Budget) -> dict[str, int] | None:
        """Sizes of a result, where data decides which units go but not what is left in numbers.

        Args:
            spec: the model.
            budget: how much to keep.

        Returns:
            Axis name -> units kept, of axes that change; None if numbers depend on data too.
        """
        del spec, budget
        return None

    def towards(self, spec: Spec, budget: Budget, progress: Fraction) -> Budget:
        """The budget of a cut on the way, where widths depend on statistics.

        Args:
            spec: the dense model.
            budget: of the last cut.
            progress: share of the way, 1 at the last cut.

        Returns:
            What is left after the cut.
        """
        del spec
        assert budget.keep is not None, "a method without fixed widths needs budget.keep"
        return replace(budget, keep=1 - float(progress) * (1 - budget.keep))

    def stages(self, spec: Spec) -> tuple[tuple[str, ...], ...]:
        """Linears of a block that are planned together; later ones see what earlier ones did.

        Args:
            spec: of one block.

        Returns:
            Module paths, stage by stage; default all at once.
        """
        return (tuple(spec.linears),)

    def own_budget(self) -> Budget | None:
        """The budget that follows from the hyper-parameters; None if one must be given."""
        return None

    @property
    def compensable(self) -> bool:
        """Whether what reads removed units stays, and can be given other weights."""
        return True

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return True

    @property
    def label(self) -> str:
        """Name in plans and reports."""
        return type(self).__name__

    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters as plain values, for the plan's hash and the report."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
