"""Wanda: weights times the norm of what they multiply.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
arXiv 2306.11695, and its release (locuslab/wanda).

    S_ij = |W_ij| * |x_j|_2        over all calibration tokens, compared within a row

and the lowest go. No weight is updated. Statistics of a block are taken before any of its weights
goes; the next block sees what the pruned one makes of the text.

Differences from the release: sums and counts instead of running means over sequences, so that
padding and batches do not matter; where a share of a row is no whole number, rows differ by one and
the total is exact (the release rounds every row down); N:M means N kept. `variable_rows` drops the
prefixes whose share of the row's scores is lowest, with an exact total, instead of bisecting for
it.

Not for: speed on GPUs without an N:M kernel; ratios where SparseGPT's update pays (2:4, 60 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.readers import readers
from plprune.select import lowest_of_all
from plprune.sparse import ScoredSparse
from plprune.spec import Linear, Spec
from plprune.stats.base import Tap
from plprune.stats.energy import Energy, weighed


@dataclass(frozen=True, kw_only=True)
class Wanda(ScoredSparse):
    """See the module; for N:M set `pattern`."""

    variable_rows: bool = False
    """The release's variant: every row loses the weights that make up one share of its scores, so
    rows lose different numbers."""
    true_sequential: bool = False
    """Look at each linear after those before it in the block were pruned."""

    def __post_init__(self) -> None:
        """Check the pattern.

        Raises:
            ConfigError: for variable rows with a pattern that fixes them.
        """
        super().__post_init__()
        if self.variable_rows and self.pattern != "row":
            raise ConfigError(
                "method.variable_rows needs method.pattern: row", given=f"pattern: {self.pattern}"
            )

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """Energy once for linears that read the same activation."""
        return tuple(Tap(module=names[0], stat=Energy) for names in readers(spec))

    def stages(self, spec: Spec) -> tuple[tuple[str, ...], ...]:
        """All at once, or reader by reader."""
        return readers(spec) if self.true_sequential else super().stages(spec)

    def score(self, view: View, name: str) -> Tensor:
        """|W| times the root of the mean square of its inputs."""
        return weighed(view.weight(name), view.seen(name, Energy))

    def chosen(self, score_RC: Tensor, linear: Linear, drop: int) -> Tensor:
        """The pattern's choice, or prefixes of sorted rows that hold equal shares of scores."""
        if not self.variable_rows:
            return super().chosen(score_RC, linear, drop)
        ordered = score_RC.double().sort(dim=1, stable=True)
        sums_RC = ordered.values.cumsum(1)
        # Rising within a row, so that the lowest of all are prefixes; a row of zeros goes first.
        share_RC = sums_RC / sums_RC[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
        stays_RC = lowest_of_all(share_RC.flip(1), drop).flip(1)
        return torch.empty_like(stays_RC).scatter_(1, ordered.indices, stays_RC)
