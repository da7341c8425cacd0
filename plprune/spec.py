"""A model described as axes; `Spec.cut` follows a cut without touching the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from plprune.axes import (
    SUBLAYERS,
    Axis,
    BlockDims,
    Entry,
    Linear,
    Lowered,
    Side,
    Slice,
    cut_axis,
    cut_linear,
    dims_of,
    removed_linears,
)

__all__ = [
    "SUBLAYERS",
    "Axis",
    "BlockDims",
    "Entry",
    "Linear",
    "Lowered",
    "Side",
    "Slice",
    "Spec",
    "removed_linears",
    "summary",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """A model as data, in the coordinates of its tensors."""

    family: str
    """Name of the family."""
    hidden: int
    """Residual width H."""
    linears: Mapping[str, Linear]
    """All matrices of the blocks by module path."""
    axes: Mapping[str, Axis]
    """All axes by name."""
    blocks: tuple[BlockDims, ...]
    """Logical dimensions, block by block (a masked unit no longer counts)."""
    block_rest: int
    """Parameters inside blocks that are neither in linears nor owned by an axis."""
    embedding: int
    """Parameters of embedding and head, tied counted once."""
    outside_rest: int
    """Other parameters outside the blocks (final norm, position embeddings)."""
    head_rows: int
    """Vocabulary size of the output head."""
    stack: str = ""
    """Path of the `ModuleList` of blocks."""
    dead: Mapping[Entry, Tensor] = field(default_factory=dict)
    """Bool[size], True for entries that are masked but still present in the tensors."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, logical shapes and units left; equal for masked and cut."""
        axes = {
            name: [axis.dense_size, axis.origin.tolist()]
            for name, axis in sorted(self.axes.items())
            if not axis.removable or axis.size < axis.dense_size
        }
        value = [self.family, self.hidden, [vars(block) for block in self.blocks], axes]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def of_kind(self, kind: str) -> tuple[Axis, ...]:
        """Axes of one kind, in block order."""
        return tuple(axis for axis in self.axes.values() if axis.kind == kind)

    def consumers(self, kinds: Collection[str] | None = None) -> tuple[str, ...]:
        """Linears whose inputs belong to axes, in model order.

        Args:
            kinds: axis kinds to look at; None: all widths.

        Returns:
            Module paths.
        """
        ends = {
            piece.module
            for axis in self.axes.values()
            if axis.size and (axis.kind in kinds if kinds is not None else not axis.removable)
            for piece in axis.slices
            if piece.side == "in"
        }
        return tuple(name for name in self.linears if name in ends)

    def only(self, linears: Collection[str]) -> Spec:
        """A part of the model.

        Args:
            linears: module paths.

        Returns:
            The spec with these linears and the axes whose ends are all among them.
        """
        inside = {n: linear for n, linear in self.linears.items() if n in linears}
        axes = {
            name: axis
            for name, axis in self.axes.items()
            if axis.slices and all(piece.module in inside for piece in axis.slices)
        }
        return replace(self, linears=inside, axes=axes)

    def of_block(self, number: int) -> Spec:
        """One block.

        Args:
            number: which.

        Returns:
            The spec with its linears and axes, those without units too.
        """
        linears = [n for n, linear in self.linears.items() if linear.block == number]
        own = {name: axis for name, axis in self.axes.items() if axis.block == number}
        return replace(self.only(linears), axes=own)

    def kinds(self) -> tuple[str, ...]:
        """Axis kinds that are widths, in order of appearance."""
        found = (axis.kind for axis in self.axes.values() if not axis.removable)
        return tuple(dict.fromkeys(found))

    def widths(self, *, depth: bool = False) -> dict[str, list[int]]:
        """Units of every axis kind, block by block.

        Args:
            depth: the sublayers that are there as well.

        Returns:
            Kind -> one number a block.
        """
        kinds = (*self.kinds(), *SUBLAYERS) if depth else self.kinds()
        return {kind: [axis.size for axis in self.of_kind(kind)] for kind in kinds}

    def removed(self) -> tuple[Axis, ...]:
        """Sublayers of the dense model that are gone, masked or cut."""
        axes = self.axes.values()
        return tuple(a for a in axes if a.removable and a.size < a.dense_size)

    def structure(self) -> dict[str, list[int]]:
        """Kept units in dense coordinates of every axis that lost some, JSON-able.

        Of a sublayer that is gone only that is said: its other axes follow.
        """
        return {
            name: axis.origin.tolist()
            for name, axis in self.axes.items()
            if axis.size < axis.dense_size and (axis.size or axis.removable)
        }

    def cut(self, lowered: Lowered, *, physical: bool) -> Spec:
        """Spec after a cut.

        Args:
            lowered: kept entries for the touched ends, in the coordinates of this spec.
            physical: True when the tensors shrink, False when the dropped entries are only masked.

        Returns:
            The new spec; with `physical` all coordinates are those of the smaller tensors.

        Raises:
            PlanError: if the units of an axis would keep different numbers of entries.
        """
        keep = dict(lowered)
        for entry, dead in self.dead.items():
            keep[entry] = keep.get(entry, torch.ones_like(dead)) & ~dead
        axes = {name: cut_axis(axis, keep, physical=physical) for name, axis in self.axes.items()}
        gone = removed_linears(keep) if physical else frozenset()
        linears = {
            n: cut_linear(linear, keep) if physical else linear
            for n, linear in self.linears.items()
            if n not in gone
        }
        return replace(
            self,
            axes=axes,
            linears=linears,
            blocks=tuple(dims_of(block, i, axes) for i, block in enumerate(self.blocks)),
            dead={} if physical else {entry: ~mask for entry, mask in keep.items()},
        )


def summary(spec: Spec) -> dict[str, Any]:
    """Plain numbers of a spec for logs and structure files."""
    return {
        "family": spec.family,
        "hidden": spec.hidden,
        "fingerprint": spec.fingerprint,
        "blocks": [vars(block) for block in spec.blocks],
    }
