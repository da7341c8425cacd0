"""A model described as axes; `Spec.cut` follows a cut without touching the model.

Legend: R rows (outputs) and C columns (inputs) of a linear, U units of an axis, w entries a unit
    owns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from plprune.errors import PlanError

Side = Literal["in", "out"]
Entry = tuple[str, Side]
"""(module path, side): one end of one linear."""
Lowered = Mapping[Entry, Tensor]
"""For every touched end of a linear: Bool[size], True means keep."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """One matrix of a block."""

    name: str
    """Module path in the Hugging Face model."""
    block: int
    """Index of its decoder block."""
    roles: tuple[str, ...]
    """Roles its rows play; more than one when fused."""
    rows: int
    """Physical outputs R."""
    cols: int
    """Physical inputs C."""
    bias: bool
    """Whether it has a bias of R entries."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """What the units of an axis own on one end of one linear."""

    module: str
    """Module path."""
    side: Side
    """`out` for rows, `in` for columns."""
    index: Tensor
    """[U, w] int64: entry `index[u, j]` of that end belongs to unit u."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """A shrinkable dimension of one block."""

    name: str
    """Unique name, e.g. `layers.3.mlp`."""
    kind: str
    """`mlp`, `kv_group` (a KV head with its query heads) or `query_in_group`."""
    block: int
    """Block index."""
    slices: tuple[Slice, ...]
    """Ends of linears it covers; the first is the anchor that decides whether a unit still
    exists."""
    origin: Tensor
    """[U] int64: number of each unit in the dense model, ascending."""
    group: Tensor
    """[U] int64: group of each unit; every group must keep the same count."""
    dense_size: int
    """Units in the dense model."""

    @property
    def reader(self) -> Slice:
        """The end of the linear that reads the units."""
        return next(piece for piece in self.slices if piece.side == "in")

    @property
    def size(self) -> int:
        """Units U."""
        return len(self.origin)

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return len(torch.unique(self.group))


@dataclass(frozen=True, kw_only=True)
class BlockDims:
    """Logical dimensions of one block."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    head_dim: int
    """Width of a head."""
    ffn: int
    """MLP channels."""


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
    """Parameters inside blocks outside the linears (norms)."""
    embedding: int
    """Parameters of embedding and head, tied counted once."""
    outside_rest: int
    """Other parameters outside the blocks (final norm, position embeddings)."""
    head_rows: int
    """Vocabulary size of the output head."""
    dead: Mapping[Entry, Tensor] = field(default_factory=dict)
    """Bool[size], True for entries that are masked but still present in the tensors."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, logical shapes and units left; equal for masked and cut."""
        axes = {
            name: [axis.dense_size, axis.origin.tolist()]
            for name, axis in sorted(self.axes.items())
        }
        value = [self.family, self.hidden, [vars(block) for block in self.blocks], axes]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def of_kind(self, kind: str) -> tuple[Axis, ...]:
        """Axes of one kind, in block order."""
        return tuple(axis for axis in self.axes.values() if axis.kind == kind)

    def consumers(self, kinds: Collection[str] | None = None) -> tuple[str, ...]:
        """Linears whose inputs belong to axes, in model order.

        Args:
            kinds: axis kinds to look at; None: all.

        Returns:
            Module paths.
        """
        ends = {
            piece.module
            for axis in self.axes.values()
            if kinds is None or axis.kind in kinds
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
            if all(piece.module in inside for piece in axis.slices)
        }
        return replace(self, linears=inside, axes=axes)

    def of_block(self, number: int) -> Spec:
        """One block.

        Args:
            number: which.

        Returns:
            The spec with its linears and axes.
        """
        return self.only([n for n, linear in self.linears.items() if linear.block == number])

    def kinds(self) -> tuple[str, ...]:
        """Axis kinds present, in order of appearance."""
        return tuple(dict.fromkeys(axis.kind for axis in self.axes.values()))

    def widths(self) -> dict[str, list[int]]:
        """Units of every axis kind, block by block."""
        return {kind: [axis.size for axis in self.of_kind(kind)] for kind in self.kinds()}

    def structure(self) -> dict[str, list[int]]:
        """Kept units in dense coordinates of every axis that lost some, JSON-able."""
        return {
            name: axis.origin.tolist()
            for name, axis in self.axes.items()
            if axis.size < axis.dense_size
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
        axes = {name: _cut_axis(axis, keep, physical) for name, axis in self.axes.items()}
        linears = {
            n: _cut_linear(linear, keep) if physical else linear
            for n, linear in self.linears.items()
        }
        return replace(
            self,
            axes=axes,
            linears=linears,
            blocks=tuple(_dims(block, i, axes) for i, block in enumerate(self.blocks)),
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


def _cut_axis(axis: Axis, keep: Lowered, physical: bool) -> Axis:
    anchor = axis.slices[0]
    mask = keep.get((anchor.module, anchor.side))
    alive_U = (
        torch.ones(axis.size, dtype=torch.bool) if mask is None else mask[anchor.index].all(dim=1)
    )
    slices = tuple(_cut_slice(piece, keep, alive_U, physical) for piece in axis.slices)
    return replace(axis, slices=slices, origin=axis.origin[alive_U], group=axis.group[alive_U])


def _cut_slice(piece: Slice, keep: Lowered, alive_U: Tensor, physical: bool) -> Slice:
    index = piece.index[alive_U]
    mask = keep.get((piece.module, piece.side))
    if mask is None:
        return replace(piece, index=index)
    kept = mask[index]
    counts = kept.sum(dim=1)
    if len(counts) and not bool((counts == counts[0]).all()):
        raise PlanError(
            "units would keep uneven groups",
            given=f"{int(counts.min())} to {int(counts.max())} entries a unit at "
            f"{piece.module} ({piece.side})",
            allowed="the same number in every unit",
            fix="keep equally many units in every group, and drop what reads a dropped one too",
        )
    index = index[kept].reshape(len(index), -1)
    if physical:
        index = (mask.cumsum(0) - 1)[index]
    return replace(piece, index=index)


def _cut_linear(linear: Linear, keep: Lowered) -> Linear:
    rows, cols = keep.get((linear.name, "out")), keep.get((linear.name, "in"))
    return replace(
        linear,
        rows=linear.rows if rows is None else int(rows.sum()),
        cols=linear.cols if cols is None else int(cols.sum()),
    )


def _dims(block: BlockDims, number: int, axes: Mapping[str, Axis]) -> BlockDims:
    own = {axis.kind: axis for axis in axes.values() if axis.block == number}
    kv = own["kv_group"].size if "kv_group" in own else block.kv_heads
    heads = (
        own["query_in_group"].size
        if "query_in_group" in own
        else kv * (block.heads // block.kv_heads)
    )
    ffn = own["mlp"].size if "mlp" in own else block.ffn
    return replace(block, heads=heads, kv_heads=kv, ffn=ffn)
