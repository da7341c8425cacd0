"""Pick the best units or weights from scores: stable, ties to the lower index, counts exact.

Legend: U units, K kept units, R rows and C columns of a linear, N kept weights of M.
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
    _require_finite(score_U)
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


_CHUNK = 1 << 24
"""Entries that are sorted at a time; the sort's int64 order is the largest thing in memory."""


def lowest_per_row(score_RC: Tensor, drop: int | Tensor) -> Tensor:
    """Drop the lowest scores of every row.

    Args:
        score_RC: [R, C] finite.
        drop: scores to drop of each row, one number or [R] int64, 0 to C.

    Returns:
        [R, C] bool, True for what is kept.

    Raises:
        PlanError: if a score is not finite or a count does not fit.
    """
    rows, cols = score_RC.shape
    drop_R = torch.as_tensor(drop, device=score_RC.device).expand(rows)
    _require_finite(score_RC)
    if rows and not (int(drop_R.min()) >= 0 and int(drop_R.max()) <= cols):
        raise PlanError(
            "cannot drop that many weights of a row",
            given=f"{int(drop_R.min())} to {int(drop_R.max())} of {cols}",
            allowed=f"0 to {cols}",
        )
    keep_RC = torch.empty(rows, cols, dtype=torch.bool, device=score_RC.device)
    step = max(1, _CHUNK // max(1, cols))
    places_C = torch.arange(cols, device=score_RC.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        # Descending and stable: of equals the lower index comes first, and is kept.
        order = torch.sort(score_RC[part], dim=1, descending=True, stable=True).indices
        stays = places_C < cols - drop_R[part, None]
        keep_RC[part] = torch.empty_like(stays).scatter_(1, order, stays)
    return keep_RC


def lowest_of_all(score_RC: Tensor, drop: int) -> Tensor:
    """Drop the lowest scores of a whole matrix; see `lowest_per_row`."""
    return lowest_per_row(score_RC.reshape(1, -1), drop).reshape(score_RC.shape)


def n_of_m(score_RC: Tensor, n: int, m: int) -> Tensor:
    """Keep the highest N of every M neighbours in a row, as sparse matrix units want them.

    Args:
        score_RC: [R, C] finite, C a multiple of M.
        n: how many stay.
        m: of how many.

    Returns:
        [R, C] bool, True for what is kept.

    Raises:
        PlanError: if a score is not finite or M does not divide C.
    """
    if not 0 < n <= m or score_RC.shape[-1] % m:
        raise PlanError(
            "these groups do not fit the matrix",
            given=f"{n}:{m} of {score_RC.shape[-1]} columns",
            allowed="N of M with 0 < N <= M and M dividing the columns",
            fix="choose another pattern, or leave this linear out",
        )
    return lowest_per_row(score_RC.reshape(-1, m), m - n).reshape(score_RC.shape)


def _require_finite(score: Tensor) -> None:
    finite = torch.isfinite(score)
    if not bool(finite.all()):
        raise PlanError(
            "scores are not finite",
            given=f"{int((~finite).sum())} of {score.numel()} are NaN or infinite",
            allowed="finite scores",
            fix="check the model and the calibration data for NaN; try float32",
        )
