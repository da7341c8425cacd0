"""Give a dense model the structure of a pruned one, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from plprune.describe import describe
from plprune.errors import StructureError
from plprune.plan import Keep, Plan
from plprune.spec import Axis, Spec
from plprune.surgery.apply import Applied, commit, kept_entries
from plprune.surgery.lower import lower
from plprune.surgery.state import Cuts, cut_table

FORMAT = 1


def structure_of(spec: Spec, dense: Spec) -> dict[str, Any]:
    """The structure as plain, readable values.

    Args:
        spec: the pruned model.
        dense: the model it came from.

    Returns:
        JSON-able dict: format, family, fingerprints, dense and present dimensions, kept units by
        axis.
    """
    return {
        "format": FORMAT,
        "family": spec.family,
        "dense_fingerprint": dense.fingerprint,
        "fingerprint": spec.fingerprint,
        "dense_blocks": [dict(vars(block)) for block in dense.blocks],
        "blocks": [dict(vars(block)) for block in spec.blocks],
        "kept": spec.structure(),
    }


def plan_for(structure: Mapping[str, Any], spec: Spec) -> Plan:
    """The plan that turns the dense model into the structure.

    Args:
        structure: from `structure_of`.
        spec: the dense model.

    Returns:
        A plan of `Keep` edits.

    Raises:
        StructureError: if the structure is damaged or belongs to another dense model.
    """
    try:
        version, kept = structure["format"], dict(structure["kept"])
        wanted, fingerprint = structure["dense_fingerprint"], structure["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise StructureError(
            "not a plprune structure", given=f"missing {error}", allowed="a dict written by plprune"
        ) from error
    if version != FORMAT:
        raise StructureError(
            "unknown structure format",
            given=str(version),
            allowed=str(FORMAT),
            fix="update plprune",
        )
    if wanted != spec.fingerprint:
        raise StructureError(
            "the structure belongs to another base model",
            given=f"dense fingerprint {wanted} ({_sizes(structure.get('dense_blocks'))})",
            allowed=f"{spec.fingerprint} ({_sizes([vars(b) for b in spec.blocks])})",
            fix="build the model from the base checkpoint named in the structure",
        )
    edits = []
    for name, units in kept.items():
        axis = spec.axes.get(name)
        if axis is None or not _valid(units, axis):
            raise StructureError(
                f"damaged structure at axis {name}",
                given=f"{len(units)} kept units" if isinstance(units, list) else repr(units),
                allowed="ascending unit numbers of an axis of this model",
            )
        edits.append(Keep(axis=name, kept=torch.tensor(units, dtype=torch.int64)))
    plan = Plan(edits=tuple(edits), fingerprint=spec.fingerprint, method="structure")
    made = spec.cut(lower(plan, spec), physical=True).fingerprint
    if made != fingerprint:
        raise StructureError(
            "damaged structure",
            given=f"fingerprint {fingerprint}",
            allowed=f"{made}, what its kept units give",
            fix="take the structure file from the checkpoint again",
        )
    return plan


def keep_edits(spec: Spec, kept: Mapping[str, Sequence[int]]) -> tuple[Keep, ...]:
    """Edits that leave an axis no other units than those of a structure.

    Args:
        spec: of the dense model, or one that was cut on the way to the structure.
        kept: axis name -> unit numbers in the dense model.

    Returns:
        One edit for each axis that has more.
    """
    edits = []
    for name, units in kept.items():
        origin = spec.axes[name].origin
        if not units and not spec.axes[name].removable:
            continue  # its sublayer is gone, which is said of that
        stays = torch.isin(origin, torch.tensor(list(units), dtype=torch.int64))
        if not bool(stays.all()):
            edits.append(Keep(axis=name, kept=torch.nonzero(stays)[:, 0]))
    return tuple(edits)


def rebuild(model: nn.Module, structure: Mapping[str, Any]) -> Applied:
    """Cut a dense model to a saved structure.

    Args:
        model: the dense model, on any device; changed in place.
        structure: from `structure_of`.

    Returns:
        Spec after the cut and the replaced parameters.

    Raises:
        StructureError: if the structure does not fit.
    """
    return rebuild_with_cuts(model, structure)[1]


def rebuild_with_cuts(
    model: nn.Module, structure: Mapping[str, Any]
) -> tuple[Spec, Applied, dict[str, Cuts]]:
    """The same, and how the tensors of the dense model become those of the cut one.

    Args:
        model: as in `rebuild`.
        structure: from `structure_of`.

    Returns:
        Spec of the dense model, spec after the cut and the replaced parameters, cuts by name.

    Raises:
        StructureError: if the structure does not fit.
    """
    spec = describe(model)
    lowered = lower(plan_for(structure, spec), spec)
    table = cut_table(model, kept_entries(spec, lowered))
    return spec, commit(model, spec, lowered), table


def _valid(units: object, axis: Axis) -> bool:
    if not isinstance(units, list) or not all(type(unit) is int for unit in units):
        return False
    if not units:
        return axis.removable and axis.size > 0
    return units[0] >= 0 and units[-1] < axis.size and sorted(set(units)) == units


def _sizes(blocks: object) -> str:
    if not isinstance(blocks, list) or not blocks or not isinstance(blocks[0], dict):
        return "no blocks"
    heads, kv_heads, ffn = (blocks[0].get(key, "?") for key in ("heads", "kv_heads", "ffn"))
    return f"{len(blocks)} blocks of {heads}/{kv_heads} heads, FFN {ffn}"
