"""Pick the best units from scores: stable, ties to the lower index.

Legend: U units, K kept units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plprune.errors import PlanError


def top_units(score_U: Tensor, keep: int, group_U: Tensor | None = None) -> Tensor:
    """Indices of the units with the highest scores.

    Args:
        score_U: [U] finite, higher is better.
        keep: units to keep in all; with groups it must divide evenly among them.
        group_U: [U] group of each unit; every group keeps the same count. None means one group.

    Returns:
        [keep] int64, ascending.

    Raises:
        PlanError: if a score is not finite or the count does not fit.
    """
    if not bool(torch.isfinite(score_U).all()):
        bad = int((~torch.isfinite(score_U)).sum())
        raise PlanError(
            "scores are not finite",
            given=f"{bad} of {len(score_U)} are NaN or infinite",
            allowed="finite scores",
            fix="check the model and the calibration data for NaN; try float32",
        )
    labels = torch.zeros(len(score_U), dtype=torch.int64) if group_U is None else group_U
    groups = torch.unique(labels)
    share, left = divmod(keep, len(groups))
    if left or not 1 <= share <= len(score_U) // len(groups):
        raise PlanError(
            "cannot keep that many units",
            given=f"{keep} of {len(score_U)} in {len(groups)} groups",
            allowed=f"{len(groups)} to {len(score_U)} in steps of {len(groups)}",
        )
    kept = []
    for label in groups:
        members = torch.nonzero(labels == label)[:, 0]
        # A stable descending sort puts the lower index first among equals.
        order = torch.sort(score_U[members].double(), descending=True, stable=True).indices
        kept.append(members[order[:share]])
    return torch.cat(kept).sort().values
