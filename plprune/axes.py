"""What a model is made of for pruning: linears, axes, dimensions; and how a cut changes them.

Legend: R rows (outputs) and C columns (inputs) of a linear, U units of an axis, w entries a unit
    owns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from plprune.errors import PlanError

SUBLAYERS = ("attention_sublayer", "mlp_sublayer")
"""Axis kinds with one unit a block, which may go: all of its attention, all of its MLP."""

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
    """`mlp`, `kv_group` (a KV head with its query heads), `query_in_group`, or one of
    `SUBLAYERS`."""
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
    own: int = 0
    """Parameters outside the linears that go with a unit: norms of a sublayer."""
    stream: tuple[str, str] = ("", "")
    """Of a sublayer: the module whose input is the residual stream, and the one whose output is
    added to it."""

    @property
    def removable(self) -> bool:
        """Whether its last unit may go."""
        return self.kind in SUBLAYERS

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


def removed_linears(lowered: Lowered) -> frozenset[str]:
    """Linears of which no output is left.

    Args:
        lowered: kept entries by (module, side).

    Returns:
        Module paths; only a removed sublayer has such.
    """
    ends = lowered.items()
    return frozenset(n for (n, side), keep in ends if side == "out" and not bool(keep.any()))


def cut_axis(axis: Axis, keep: Lowered, *, physical: bool) -> Axis:
    """An axis after a cut; see `Spec.cut`.

    Args:
        axis: before it.
        keep: kept entries, without those that are masked already.
        physical: whether tensors shrink.

    Raises:
        PlanError: if its units would keep different numbers of entries.
    """
    if not axis.slices:
        return axis
    anchor = axis.slices[0]
    mask = keep.get((anchor.module, anchor.side))
    alive_U = (
        torch.ones(axis.size, dtype=torch.bool) if mask is None else mask[anchor.index].all(dim=1)
    )
    left = axis.slices if bool(alive_U.any()) or not physical else ()
    slices = tuple(_cut_slice(piece, keep, alive_U, physical) for piece in left)
    return replace(axis, slices=slices, origin=axis.origin[alive_U], group=axis.group[alive_U])


def _cut_slice(piece: Slice, keep: Lowered, alive_U: Tensor, physical: bool) -> Slice:
    index = piece.index[alive_U]
    mask = keep.get((piece.module, piece.side))
    if mask is None or len(index) == 0:
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


def cut_linear(linear: Linear, keep: Lowered) -> Linear:
    """A linear after its tensors shrank; see `Spec.cut`."""
    rows, cols = keep.get((linear.name, "out")), keep.get((linear.name, "in"))
    return replace(
        linear,
        rows=linear.rows if rows is None else int(rows.sum()),
        cols=linear.cols if cols is None else int(cols.sum()),
    )


def dims_of(block: BlockDims, number: int, axes: Mapping[str, Axis]) -> BlockDims:
    """Logical dimensions of a block after a cut.

    Args:
        block: before it.
        number: of the block.
        axes: of the model after it.
    """
    own = {axis.kind: axis for axis in axes.values() if axis.block == number}
    kv = own["kv_group"].size if "kv_group" in own else block.kv_heads
    if kv == 0:  # there is no attention
        block, kv = replace(block, heads=0, kv_heads=1, head_dim=0), 0
    heads = (
        own["query_in_group"].size
        if "query_in_group" in own
        else kv * (block.heads // block.kv_heads)
    )
    ffn = own["mlp"].size if "mlp" in own else block.ffn
    return replace(block, heads=heads, kv_heads=kv, ffn=ffn)
