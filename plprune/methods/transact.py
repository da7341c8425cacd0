"""TransAct: iterative structured pruning guided by transitional activations.

Shen et al., "Pruning Large Language Models to Intra-module Low-rank Architecture with Transitional
Activations", Findings of ACL 2024, arXiv 2407.05690; where paper and release may differ, the
release (XiaoMi/transact-pruning).

What is pruned: whole attention heads and MLP channels, equally many in every block; the residual
stream never. Transitional activations are the inputs of the attention output and of the MLP down
projection. With x their entries over samples n and tokens t,

    s = sqrt(sum_n sum_t x^2)                    per entry (head k, position j) or MLP channel i
    S_head = mean_j s_kj + alpha * max_j s_kj    alpha = 10 / head width
    S_mlp  = s_i

and the highest scores stay, in their order, weights unchanged. Between K = 8 cuts all weights are
trained and the calibration set (128 x 4096 tokens) is run again.

Differences from the release: under grouped-query attention the unit is a KV group, scored by the
mean of its query heads (the release overwrites the KV count); `head_score: sq_sum_max` is the
squared form that reviews of the paper describe; sums run in float64; ties go to the lower index.

Not for: large ratios without training between the cuts; very few KV heads (a unit is then a third
or a half of all attention, use `attention: query_in_group` or `none`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.spec import Axis, Spec
from plprune.stats.base import Tap
from plprune.stats.energy import Energy
from plprune.structured import StructuredMethod, consumer_index

# Legend: U units, N query heads of a unit, E head width, w entries of a unit.

HeadScore = Literal["l2_mean_max", "sq_sum_max"]


def head_scores(energy_NE: Tensor, alpha: float | None, form: HeadScore) -> Tensor:
    """Salience of attention heads.

    Args:
        energy_NE: [..., E] sums of squares of the entries of each head.
        alpha: weight of the strongest entry; None means 10 / E (mean form) or 10 (sum form).
        form: `l2_mean_max` as released, or `sq_sum_max` on squares.

    Returns:
        [...] float64 scores.
    """
    width = energy_NE.shape[-1]
    if form == "l2_mean_max":
        s = energy_NE.double().sqrt()
        return s.mean(-1) + (10 / width if alpha is None else alpha) * s.amax(-1)
    squares = energy_NE.double()
    return squares.sum(-1) + (10 if alpha is None else alpha) * squares.amax(-1)


@dataclass(frozen=True, kw_only=True)
class TransAct(StructuredMethod):
    """Keep the heads and MLP channels with the largest transitional activations."""

    head_score: HeadScore = "l2_mean_max"
    """Form of the head score."""
    alpha: float | None = None
    """Weight of a head's strongest entry; default 10 / head width."""
    skip_first_tokens: int = 0
    """Leave the first tokens of every sequence out (attention sinks); 0 is faithful."""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: for an unknown choice, a negative number, or nothing to cut.
        """
        super().__post_init__()
        if self.head_score not in get_args(HeadScore):
            raise ConfigError(
                "unknown method.head_score",
                given=repr(self.head_score),
                allowed=", ".join(get_args(HeadScore)),
            )
        if self.skip_first_tokens < 0 or (self.alpha is not None and self.alpha < 0):
            raise ConfigError(
                "negative method setting",
                given=f"{self.skip_first_tokens}, {self.alpha}",
                allowed=">= 0",
            )

    def looks_at(self, spec: Spec) -> tuple[Tap, ...]:
        """Energy at the inputs of the attention output and of the down projection, every block."""
        return tuple(Tap(module=name, stat=Energy) for name in spec.consumers(self.kinds))

    def scores(self, view: View) -> dict[str, Tensor]:
        """Salience of every unit, inside its block."""
        return {axis.name: self._score(view, axis) for axis in self.axes(view.spec)}

    def _score(self, view: View, axis: Axis) -> Tensor:
        consumer, index_Uw = consumer_index(axis)
        energy_Uw = view.seen(consumer, Energy).xx_C.cpu()[index_Uw]
        if axis.kind == "mlp":
            return energy_Uw.sqrt()[:, 0]
        width = view.spec.blocks[axis.block].head_dim
        energy_UNE = energy_Uw.reshape(len(energy_Uw), -1, width)
        return head_scores(energy_UNE, self.alpha, self.head_score).mean(dim=1)
