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

import torch
from torch import Tensor

from plprune.allocate import fixed_widths, sizes_of, uniform
from plprune.budget import Budget, require_numbers
from plprune.errors import BudgetError, ConfigError
from plprune.methods.base import Method, View
from plprune.plan import Keep, Plan
from plprune.select import top_units
from plprune.spec import Axis, Spec
from plprune.stats.base import Tap
from plprune.stats.energy import Energy

# Legend: U units, N query heads of a unit, E head width, w entries of a unit.

HeadScore = Literal["l2_mean_max", "sq_sum_max"]
Attention = Literal["kv_group", "query_in_group", "none"]


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
class TransAct(Method):
    """Keep the heads and MLP channels with the largest transitional activations."""

    attention: Attention = "kv_group"
    """Attention unit: a KV head with its query heads, query heads equally in all groups, or
    nothing."""
    mlp: bool = True
    """Whether MLP channels are cut."""
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
        require_numbers(self, "method")
        for name, choices in (
            ("attention", get_args(Attention)),
            ("head_score", get_args(HeadScore)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"unknown method.{name}",
                    given=repr(getattr(self, name)),
                    allowed=", ".join(choices),
                )
        if self.attention == "none" and not self.mlp:
            raise ConfigError(
                "nothing to cut", given="attention: none and mlp: false", fix="set mlp: true"
            )
        if self.skip_first_tokens < 0 or (self.alpha is not None and self.alpha < 0):
            raise ConfigError(
                "negative method setting",
                given=f"{self.skip_first_tokens}, {self.alpha}",
                allowed=">= 0",
            )

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        """Energy at the inputs of the attention output and of the down projection, every block."""
        return tuple(Tap(module=name, stat=Energy) for name in spec.consumers(self._kinds()))

    def widths(self, spec: Spec, budget: Budget) -> dict[str, list[int]]:
        """Equal widths in every block, or those the budget states.

        Args:
            spec: the model.
            budget: how much to keep.

        Returns:
            Units per block by axis kind.

        Raises:
            BudgetError: if no widths meet the budget, or it states widths of what is not cut.
        """
        kinds = self._kinds()
        for kind in budget.widths:
            # Kinds the model does not have are refused below, with those it has.
            if kind in spec.kinds() and kind not in kinds:
                raise self._not_cut(kind, kinds)
        if budget.keep is None:
            return fixed_widths(spec, budget)
        return uniform(spec, budget, kinds)

    def _kinds(self) -> tuple[str, ...]:
        kinds: tuple[str, ...] = () if self.attention == "none" else (self.attention,)
        return (*kinds, "mlp") if self.mlp else kinds

    def _not_cut(self, kind: str, kinds: tuple[str, ...]) -> BudgetError:
        allow = "mlp: true" if kind == "mlp" else f"attention: {kind}"
        return BudgetError(
            f"budget.widths.{kind} is given, but the method does not cut {kind}",
            given=f"attention: {self.attention}, mlp: {str(self.mlp).lower()}",
            allowed=f"widths of {' and '.join(kinds)}",
            fix=f"remove budget.widths.{kind}, or set {allow} in the method",
        )

    def plan(self, view: View, budget: Budget) -> Plan:
        """Score every axis inside its block and keep its best units."""
        widths = self.widths(view.spec, budget)
        sizes = sizes_of(view.spec, widths)
        edits, scores = [], {}
        for name, keep in sizes.items():
            axis = view.spec.axes[name]
            score_U = self._score(view, axis)
            scores[name] = score_U.float()
            kept = top_units(score_U, keep, axis.group)
            if keep < axis.size:
                edits.append(Keep(axis=name, kept=kept))
        return Plan(
            edits=tuple(edits),
            fingerprint=view.spec.fingerprint,
            method=self.label,
            hyper=self.hyper(),
            asked=budget,
            got={kind: tuple(per_block) for kind, per_block in widths.items()},
            scores=scores,
            calibration=view.calibration,
        )

    def _score(self, view: View, axis: Axis) -> Tensor:
        consumer = next(piece for piece in axis.slices if piece.side == "in")
        stat = view.stats[Tap(module=consumer.module, stat=Energy)]
        energy_Uw = torch.as_tensor(stat.xx_C).cpu()[consumer.index]  # type: ignore[attr-defined]
        if axis.kind == "mlp":
            return energy_Uw.sqrt()[:, 0]
        width = view.spec.blocks[axis.block].head_dim
        energy_UNE = energy_Uw.reshape(len(energy_Uw), -1, width)
        return head_scores(energy_UNE, self.alpha, self.head_score).mean(dim=1)
