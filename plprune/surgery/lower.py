"""From edits on axes to kept entries on the ends of linears."""

from __future__ import annotations

import torch
from torch import Tensor

from plprune.errors import PlanError
from plprune.plan import Keep, Plan
from plprune.spec import Axis, Entry, Lowered, Spec


def lower(plan: Plan, spec: Spec) -> Lowered:
    """Kept entries of every touched end; axes that cross are combined by a logical and.

    Args:
        plan: made for `spec`.
        spec: the model.

    Returns:
        (module, side) -> Bool[size] in the coordinates of the tensors; masked entries are False
        already.

    Raises:
        PlanError: if the plan was made for another model, keeps units that do not exist, or uneven
            groups.
    """
    if plan.fingerprint != spec.fingerprint:
        raise PlanError(
            "the plan was made for another model",
            given=f"fingerprint {plan.fingerprint}",
            allowed=spec.fingerprint,
            fix="plan again on the model as it is now",
        )
    keep: dict[Entry, Tensor] = {}
    for edit in plan.edits:
        if not isinstance(edit, Keep):
            continue
        axis = spec.axes.get(edit.axis)
        if axis is None:
            raise PlanError(
                "unknown axis", given=edit.axis, allowed=", ".join(list(spec.axes)[:6]) + ", ..."
            )
        kept = edit.kept
        if not _valid(kept, axis):
            raise PlanError(
                f"kept units of {edit.axis} are not valid",
                given=f"{len(kept)} units",
                allowed=f"{0 if axis.removable else 1}..{axis.size} different units in ascending "
                "order",
            )
        dropped_U = torch.ones(axis.size, dtype=torch.bool)
        dropped_U[kept] = False
        for piece in axis.slices:
            entry: Entry = (piece.module, piece.side)
            keep.setdefault(entry, _all_alive(spec, entry))[piece.index[dropped_U]] = False
    spec.cut(keep, physical=False)  # refuses uneven groups before anything is changed
    return keep


def _valid(kept: Tensor, axis: Axis) -> bool:
    if len(kept) == 0:
        return axis.removable and axis.size > 0
    inside = bool(kept.min() >= 0) and bool(kept.max() < axis.size)
    return inside and bool((kept.diff() > 0).all())


def _all_alive(spec: Spec, entry: Entry) -> Tensor:
    linear, dead = spec.linears[entry[0]], spec.dead.get(entry)
    size = linear.rows if entry[1] == "out" else linear.cols
    return torch.ones(size, dtype=torch.bool) if dead is None else ~dead
