"""Parameters, FLOPs and KV-cache bytes: arithmetic on widths, and the same counted from tensors.

`priced` works on plain numbers and on tensors alike, so a soft gate can be priced like an integer
plan.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from plprune.budget import Budget
from plprune.sharded import full_shape
from plprune.spec import Axis, Entry, Side, Spec
from plprune.surgery.linear_like import is_adapter_parameter, shape_of
from plprune.unwrap import family_of, unwrap

Sizes = Mapping[str, Any]
"""Axis name -> units kept (int, float or 0-d tensor), over all groups; axes left out keep all."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """One quantity for the four bases a ratio can refer to."""

    prunable: float
    """Of the linears of the blocks."""
    blocks: float
    """Of the decoder blocks, norms included."""
    non_embedding: float
    """Of everything but embedding and output head."""
    model: float
    """Of the whole model; tied tensors once."""

    def of(self, base: str) -> float:
        """Value for one base."""
        return float(getattr(self, base))

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Everything a report says about the size of a model."""

    params: Counts
    """Parameters."""
    flops: Counts
    """Forward FLOPs per token at `context` tokens (one multiply-add is two)."""
    kv_cache: float
    """KV-cache bytes per token."""
    bytes: int
    """Bytes of all parameter tensors as they are stored, adapters left out."""
    formats: str
    """Number formats of those tensors."""
    adapter_params: int
    """Parameters of LoRA adapters, not part of `params`."""
    context: int
    """Context length of `flops`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            **vars(self),
            "params": self.params.to_dict(),
            "flops": self.flops.to_dict(),
        }


def count_params(spec: Spec, sizes: Sizes | None = None) -> Counts:
    """Parameters of a model at given widths.

    Args:
        spec: the model.
        sizes: units kept by axis; `None` counts the spec as it is (masked units do not count).

    Returns:
        Counts for the four bases; tensors in `sizes` make them differentiable.
    """
    prunable: Any = 0
    for name, linear in spec.linears.items():
        rows = _extent(spec, name, "out", sizes)
        prunable = prunable + rows * _extent(spec, name, "in", sizes) + (rows if linear.bias else 0)
    blocks = prunable + spec.block_rest
    for axis in spec.axes.values():
        if axis.own:
            blocks = blocks + axis.own * _units(axis, sizes)
    outside = blocks + spec.outside_rest
    return Counts(
        prunable=prunable, blocks=blocks, non_embedding=outside, model=outside + spec.embedding
    )


def count_flops(spec: Spec, sizes: Sizes | None = None, *, context: int = 2048) -> Counts:
    """Forward FLOPs per token: matrix products, attention over `context` tokens, output head.

    Args:
        spec: the model.
        sizes: units kept by axis.
        context: tokens attended to.

    Returns:
        Counts; `prunable`, `blocks` and `non_embedding` are equal, `model` adds the head.
    """
    total: Any = 0
    for name, linear in spec.linears.items():
        rows, cols = _extent(spec, name, "out", sizes), _extent(spec, name, "in", sizes)
        total = total + 2 * rows * cols
        if linear.roles == ("o",):
            # Scores and weighted sum: 2 FLOPs each for every query entry and context token.
            total = total + 4 * context * cols
    return Counts(
        prunable=total,
        blocks=total,
        non_embedding=total,
        model=total + 2 * spec.hidden * spec.head_rows,
    )


def kv_cache_bytes(spec: Spec, sizes: Sizes | None = None, *, itemsize: int = 2) -> Any:
    """KV-cache bytes per token.

    Args:
        spec: the model.
        sizes: units kept by axis.
        itemsize: bytes of one cached number, default 2 (bfloat16).

    Returns:
        Bytes, a number or a tensor.
    """
    total: Any = 0
    there = {axis.block: _units(axis, sizes) for axis in spec.of_kind("attention_sublayer")}
    for axis in spec.of_kind("kv_group"):
        width = spec.blocks[axis.block].head_dim
        total = total + 2 * width * itemsize * _units(axis, sizes) * there.get(axis.block, 1)
    return total


def _units(axis: Axis, sizes: Sizes | None) -> Any:
    return axis.size if sizes is None else sizes.get(axis.name, axis.size)


def price(spec: Spec, budget: Budget, sizes: Sizes | None = None) -> Any:
    """The quantity a budget speaks of, at given widths.

    Args:
        spec: the model.
        budget: names quantity and base.
        sizes: units kept by axis.

    Returns:
        A number, or a tensor if `sizes` holds tensors.
    """
    if budget.of == "kv_cache":
        return kv_cache_bytes(spec, sizes)
    if budget.of == "flops":
        return getattr(count_flops(spec, sizes, context=budget.context), budget.base)
    return getattr(count_params(spec, sizes), budget.base)


def tally(model: nn.Module, spec: Spec, *, context: int = 2048) -> Tally:
    """Count a model from its tensors.

    Args:
        model: the model `spec` describes, possibly with adapters; meta tensors are fine.
        spec: its spec; masked entries are taken off what the tensors hold.
        context: context length for FLOPs.

    Returns:
        The numbers a report prints.
    """
    plain = unwrap(model)
    family = family_of(plain)
    inside = linears = embedding = other = adapters = stored = 0
    formats: set[str] = set()
    for name, parameter in plain.named_parameters():
        owner = name.replace(".base_layer", "").rpartition(".")[0]
        if is_adapter_parameter(name):
            adapters += full_shape(parameter).numel()
            continue
        stored += full_shape(parameter).numel() * parameter.element_size()
        formats.add(str(parameter.dtype).removeprefix("torch."))
        if owner in spec.linears:
            linears += full_shape(parameter).numel()
        elif name.startswith(f"{family.blocks}."):
            inside += full_shape(parameter).numel()
        elif owner in (family.embed, family.head):
            embedding += full_shape(parameter).numel()
        else:
            other += full_shape(parameter).numel()
    linears -= _masked(plain, spec)
    blocks = linears + inside - sum(axis.own for axis in spec.removed() if axis.slices)
    params = Counts(
        prunable=linears,
        blocks=blocks,
        non_embedding=blocks + other,
        model=blocks + other + embedding,
    )
    return Tally(
        params=params,
        flops=count_flops(spec, context=context),
        kv_cache=kv_cache_bytes(spec),
        bytes=stored,
        formats=" and ".join(sorted(formats)),
        adapter_params=adapters,
        context=context,
    )


def tally_dense(model: nn.Module, spec: Spec, dense: Spec, *, context: int = 2048) -> Tally:
    """Count the model that another was made from, as if its tensors were there.

    Args:
        model: the model `spec` describes.
        spec: its spec.
        dense: of what it was before units were cut; `spec` itself for a model that was not cut.
        context: context length for FLOPs.

    Returns:
        Its numbers; bytes are those of the tensors that are there and, for the rest, of as many
        parameters in the number format of the linears.
    """
    now = tally(model, spec, context=context)
    params = count_params(dense)
    linear = unwrap(model).get_submodule(next(iter(spec.linears)))
    width = next(linear.parameters()).element_size()
    return replace(
        now,
        params=params,
        flops=count_flops(dense, context=context),
        kv_cache=kv_cache_bytes(dense),
        bytes=now.bytes + round(params.model - now.params.model) * width,
    )


def _masked(model: nn.Module, spec: Spec) -> int:
    """Parameters that are masked but still in the tensors."""
    total = 0
    for name, linear in spec.linears.items():
        rows, cols = shape_of(model.get_submodule(name))
        live_rows, live_cols = _alive(spec, name, "out"), _alive(spec, name, "in")
        total += rows * cols - live_rows * live_cols + (rows - live_rows if linear.bias else 0)
    return total


def _extent(spec: Spec, module: str, side: Side, sizes: Sizes | None) -> Any:
    """Entries of one end that stay; axes that cross on it multiply their shares."""
    alive: Any = _alive(spec, module, side)
    extent = alive
    for axis, covered in _coverage(spec).get((module, side), ()):
        kept = _units(axis, sizes)
        if isinstance(kept, int) and kept == axis.size:
            continue
        extent = extent * (1 - covered / alive * (1 - kept / axis.size))
    # Integer sizes give integers up to the rounding of the products.
    if isinstance(extent, float) and abs(extent - round(extent)) < 1e-6:
        return round(extent)
    return extent


def _alive(spec: Spec, module: str, side: Side) -> int:
    linear, dead = spec.linears[module], spec.dead.get((module, side))
    physical = linear.rows if side == "out" else linear.cols
    return physical - (0 if dead is None else int(dead.sum()))


@functools.lru_cache(maxsize=16)
def _coverage(spec: Spec) -> Mapping[Entry, list[tuple[Axis, int]]]:
    """Axes covering each end of a linear, with the number of entries they cover."""
    table: dict[Entry, list[tuple[Axis, int]]] = {}
    for axis in spec.axes.values():
        covered: dict[Entry, int] = {}
        for piece in axis.slices:
            entry = (piece.module, piece.side)
            covered[entry] = covered.get(entry, 0) + piece.index.numel()
        for entry, count in covered.items():
            table.setdefault(entry, []).append((axis, count))
    return table
