"""How much to keep, of what: a budget names its quantity and its base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from plprune.errors import BudgetError

Quantity = Literal["params", "flops", "kv_cache"]
Base = Literal["prunable", "blocks", "non_embedding", "model"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Target size of a model.

    Give `keep`, or `widths`, or both: then the given kinds are fixed and the others are solved for.
    """

    keep: float | None = None
    """Share of the dense quantity that stays, in (0, 1]."""
    of: Quantity = "params"
    """What the share counts: parameters, forward FLOPs per token, or KV-cache bytes."""
    base: Base = "non_embedding"
    """Of which part: prunable linears, decoder blocks, all but embedding and head, or the whole
    model."""
    widths: Mapping[str, int | list[int]] = field(default_factory=dict)
    """Units to keep by axis kind (kv_group, query_in_group per group, mlp), one number or one per
    block."""
    multiple_of: Mapping[str, int] = field(default_factory=lambda: {"mlp": 64})
    """Widths that are solved for are multiples of this, by axis kind."""
    context: int = 2048
    """Context length in tokens for `of: flops`."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BudgetError: for a share outside (0, 1], unknown names, or widths below one unit.
        """
        if self.keep is None and not self.widths:
            raise BudgetError(
                "empty budget", given="neither keep nor widths", fix="set budget.keep, e.g. 0.8"
            )
        if self.keep is not None and not (math.isfinite(self.keep) and 0 < self.keep <= 1):
            raise BudgetError(
                "budget.keep out of range",
                given=str(self.keep),
                allowed="a share in (0, 1]",
                fix="0.8 keeps 80 % and removes 20 %",
            )
        for name, value, choices in (
            ("of", self.of, get_args(Quantity)),
            ("base", self.base, get_args(Base)),
        ):
            if value not in choices:
                raise BudgetError(
                    f"unknown budget.{name}", given=repr(value), allowed=", ".join(choices)
                )
        for kind, width in self.widths.items():
            if min(width if isinstance(width, list) else [width], default=0) < 1:
                raise BudgetError(
                    f"budget.widths.{kind} too small",
                    given=str(width),
                    allowed="at least 1 unit in every block",
                    fix="remove blocks with a depth method instead of emptying them",
                )
        for kind, multiple in self.multiple_of.items():
            if multiple < 1:
                raise BudgetError(
                    f"budget.multiple_of.{kind} too small", given=str(multiple), allowed="1 or more"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "keep": self.keep,
            "of": self.of,
            "base": self.base,
            "widths": {
                kind: list(w) if isinstance(w, list) else w for kind, w in self.widths.items()
            },
            "multiple_of": dict(self.multiple_of),
            "context": self.context,
        }
