"""SparseGPT: drop weights column by column, the rest makes up for it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
ICML 2023, arXiv 2301.00774, and its release (IST-DASLab/sparsegpt).

    H = sum x x^T + damping,    U^T U = H^-1,    S_ij = W_ij^2 / U_jj^2

Of every stripe of columns the lowest scores go, all rows together (N:M: of every M neighbours),
and what a column loses is passed on to the columns after it (`plprune.obs`).

Differences from the release: counts are exact (it drops one weight too many per stripe, and all
that tie); linears that read the same activation share one Gram matrix and one factor; where H
cannot be inverted the damping rises tenfold, up to the mean diagonal; sums run in float64.

Not for: speed on GPUs without an N:M kernel; calibration sets with fewer tokens than columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from plprune.budget import Budget, require_numbers
from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.obs import Choose, Groups, Share, inverse_factor, sweep
from plprune.plan import Edit, Mask, Plan, Write
from plprune.readers import readers
from plprune.sparse import SparseMethod, drops
from plprune.spec import Linear, Spec
from plprune.stats.base import Tap
from plprune.stats.gram import Gram


@dataclass(frozen=True, kw_only=True)
class SparseGPT(SparseMethod):
    """See the module; for N:M set `pattern`."""

    patterns: ClassVar[tuple[str, ...]] = ("stripe",)
    """Patterns without groups it knows."""
    pattern: str = "stripe"
    """An equal share of every `stripe` of columns, over all its rows, or N:M."""
    damping: float = 0.01
    """Added to the diagonal of H, as a share of its mean; raised tenfold where that is not
    enough."""
    block: int = 128
    """Columns of a stripe."""
    true_sequential: bool = False
    """Look at each linear after those before it in the block were pruned."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the setting.
        """
        super().__post_init__()
        require_numbers(self, "method")
        step = 1 if self.groups is None else self.groups[1]
        if not 0 < self.damping <= 1 or self.block < 1 or self.block % step:
            raise ConfigError(
                "method.damping or method.block out of range",
                given=f"{self.damping}, {self.block}",
                allowed="damping in (0, 1], a block of columns that is a multiple of M in N:M",
            )

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """A Gram matrix once for linears that read the same activation."""
        return tuple(Tap(module=names[0], stat=Gram) for names in readers(spec))

    def stages(self, spec: Spec) -> tuple[tuple[str, ...], ...]:
        """All at once, or reader by reader."""
        return readers(spec) if self.true_sequential else super().stages(spec)

    def plan(self, view: View, budget: Budget) -> Plan:
        """Settle every linear of the part in view; linears that read the same share a factor."""
        return self.planned(view, budget, tuple(self._edits(view, drops(view.spec, budget))))

    def _edits(self, view: View, due: dict[str, int]) -> Iterator[Edit]:
        for names in readers(view.spec):
            gram = view.seen(names[0], Gram)
            upper_CC, _ = inverse_factor(gram.xx_CC, self.damping)
            silent_C = gram.xx_CC.diagonal() == 0
            for name in names:
                if due[name] == 0:
                    continue
                weight_RC = view.weight(name).clone()
                weight_RC[:, silent_C.to(weight_RC.device)] = 0  # they go first
                choose = self._choose(view.spec.linears[name], due[name])
                new_RC, keep_RC = sweep(weight_RC, upper_CC, choose, self.block)
                yield Write(module=name, weight=new_RC)
                yield Mask(module=name, keep=keep_RC)

    def _choose(self, linear: Linear, drop: int) -> Choose:
        if self.groups is not None:
            return Groups(*self.groups)
        return Share(linear.rows, drop / (linear.rows * linear.cols))
