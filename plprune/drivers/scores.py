"""Scores of a plan in a few numbers, for plots."""

from __future__ import annotations

from typing import Any

import torch

from plprune.plan import Keep, Plan
from plprune.spec import Spec


def score_summary(plan: Plan, spec: Spec) -> list[dict[str, Any]]:
    """Quantiles of the scores of every axis and the lowest kept score, for plots.

    Args:
        plan: with scores.
        spec: it was made for.

    Returns:
        Plain dicts: axis, kind, block, units, quantiles (0, 5, 25, 50, 75, 95, 100 %), threshold.
    """
    points = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0], dtype=torch.float64)
    kept = {edit.axis: edit.kept for edit in plan.edits if isinstance(edit, Keep)}
    rows = []
    for name, score_U in plan.scores.items():
        axis = spec.axes[name]
        left_K = score_U[kept[name]] if name in kept else score_U
        lowest = left_K.min() if len(left_K) else score_U.max()
        rows.append(
            {
                "axis": name,
                "kind": axis.kind,
                "block": axis.block,
                "units": axis.size,
                "quantiles": torch.quantile(score_U.double(), points).tolist(),
                "threshold": float(lowest),
            }
        )
    return rows
