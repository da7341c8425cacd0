"""Read a model's shapes into a `Spec`; nothing is computed, a model on the meta device will do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.errors import FamilyError
from plprune.families.base import Family, Projection, Sublayer
from plprune.sharded import full_shape
from plprune.spec import Axis, BlockDims, Linear, Slice, Spec
from plprune.surgery.linear_like import is_adapter_parameter, is_removed, shape_of
from plprune.unwrap import family_of, unwrap

_READERS = ("q", "k", "v", "gate", "up")
_NONE = torch.zeros(0, dtype=torch.int64)


def describe(model: nn.Module, family: Family | None = None) -> Spec:
    """Describe a causal language model as axes.

    Args:
        model: a Hugging Face causal language model on any device (meta included), plain,
            peft-wrapped or compiled.
        family: its family; by default found from `model.config.model_type`.

    Returns:
        The spec, in the coordinates of the model's tensors.

    Raises:
        FamilyError: if the architecture is unknown or the modules do not fit its description.
    """
    plain = unwrap(model)
    family = family_of(plain) if family is None else family
    blocks = _module(plain, family.blocks, family)
    linears: dict[str, Linear] = {}
    axes: dict[str, Axis] = {}
    dims: list[BlockDims] = []
    norms_go = not family.pre_norm or bool(getattr(cast(Any, plain).config, family.pre_norm))
    for number, block in enumerate(cast(nn.ModuleList, blocks)):
        reader = _BlockReader(family, number, block, norms_go=norms_go)
        linears.update(reader.linears)
        dims.append(reader.dims)
        axes.update((axis.name, axis) for axis in reader.axes())
    if not linears:
        raise FamilyError(
            "nothing is left in any block",
            given=f"{len(dims)} blocks without attention and MLP",
            allowed="at least one sublayer",
        )
    hidden = next(linear.cols for linear in linears.values() if linear.roles[0] in _READERS)
    rest, embedding, outside = _fixed_parameters(plain, family, linears)
    rest -= sum(axis.own for axis in axes.values())
    return Spec(
        family=family.name,
        hidden=hidden,
        linears=linears,
        axes=axes,
        blocks=tuple(dims),
        block_rest=rest,
        embedding=embedding,
        outside_rest=outside,
        stack=family.blocks,
        head_rows=shape_of(_module(plain, family.head, family))[0],
    )


def half_of(role: str) -> str:
    """`attention` or `mlp`, by a role in it."""
    return "mlp" if role in ("gate", "up", "down") else "attention"


class _BlockReader:
    """Shapes and index tables of one block."""

    def __init__(self, family: Family, number: int, block: nn.Module, *, norms_go: bool) -> None:
        self.family, self.number, self.block = family, number, block
        self.removable = norms_go
        self.linears: dict[str, Linear] = {}
        for role, projection in family.roles.items():
            name = self.path(role)
            if name in self.linears or self._is_gone(role):
                continue
            module = _module(block, projection.path, family)
            rows, cols = shape_of(module)
            base = getattr(module, "base_layer", module)
            self.linears[name] = Linear(
                name=name,
                block=number,
                roles=projection.parts or (role,),
                rows=rows,
                cols=cols,
                bias=getattr(base, "bias", None) is not None,
            )
        self.dims = self._dims()

    def path(self, role: str) -> str:
        return f"{self.family.blocks}.{self.number}.{self.family.roles[role].path}"

    def _is_gone(self, role: str) -> bool:
        half = self.family.sublayers.get(half_of(role))
        return half is not None and is_removed(_module(self.block, half.modules[0], self.family))

    def _dims(self) -> BlockDims:
        ffn = 0 if self._is_gone("down") else self.linears[self.path("down")].cols
        if self._is_gone("o"):
            return BlockDims(heads=0, kv_heads=0, head_dim=0, ffn=ffn)
        attention = _module(self.block, self.family.attention, self.family)
        width = int(getattr(attention, self.family.head_dim))
        heads, left = divmod(self.linears[self.path("o")].cols, width)
        key, rows = self.family.roles["k"], self.linears[self.path("k")].rows
        if key.interleaved:
            kv_heads = rows // (len(key.parts) * width)
        elif key.parts:
            kv_heads = (rows - heads * width) // (2 * width)
        else:
            kv_heads = rows // width
        if left or kv_heads < 1 or heads % kv_heads:
            raise FamilyError(
                f"attention of block {self.number} does not fit family {self.family.name}",
                given=f"{heads} query heads, {kv_heads} KV heads, head width {width}, "
                f"o has {left} columns left over",
                allowed="query heads a multiple of KV heads, all of one width",
                fix="correct the family's roles, see docs/add_a_family.md",
            )
        return BlockDims(heads=heads, kv_heads=kv_heads, head_dim=width, ffn=ffn)

    def _rows(self, role: str, units: int, width: int) -> Tensor:
        """[units, width] rows of a role, unit by unit."""
        projection: Projection = self.family.roles[role]
        unit_U1, entry_1W = torch.arange(units)[:, None], torch.arange(width)[None]
        if not projection.parts:
            return unit_U1 * width + entry_1W
        part = projection.parts.index(role)
        if projection.interleaved:
            return (unit_U1 * len(projection.parts) + part) * width + entry_1W
        before = sum(self._extent(other) for other in projection.parts[:part])
        return before + unit_U1 * width + entry_1W

    def _extent(self, role: str) -> int:
        dims = self.dims
        return {"q": dims.heads * dims.head_dim, "gate": dims.ffn, "up": dims.ffn}.get(
            role, dims.kv_heads * dims.head_dim
        )

    def _slice(self, role: str, index: Tensor) -> Slice:
        side = "in" if role in ("o", "down") else "out"
        return Slice(module=self.path(role), side=side, index=index)  # type: ignore[arg-type]

    def axes(self) -> Iterator[Axis]:
        yield from self._attention_axes()
        yield from self._mlp_axes()
        for half in self.family.sublayers if self.removable else ():
            yield self._sublayer(half)

    def _attention_axes(self) -> Iterator[Axis]:
        dims = self.dims
        if not dims.heads:
            yield self._axis("kv_group", ())
            yield self._axis("query_in_group", ())
            return
        rep = dims.heads // dims.kv_heads
        q_NE = self._rows("q", dims.heads, dims.head_dim)
        o_NE = torch.arange(dims.heads * dims.head_dim).reshape(dims.heads, dims.head_dim)
        kv = [
            self._slice(role, self._rows(role, dims.kv_heads, dims.head_dim)) for role in ("k", "v")
        ]
        grouped = [
            self._slice(role, t.reshape(dims.kv_heads, -1))
            for role, t in (("q", q_NE), ("o", o_NE))
        ]
        yield self._axis("kv_group", (*kv, *grouped), torch.zeros(dims.kv_heads, dtype=torch.int64))
        heads = (self._slice("q", q_NE), self._slice("o", o_NE))
        yield self._axis("query_in_group", heads, torch.arange(dims.heads) // rep)

    def _mlp_axes(self) -> Iterator[Axis]:
        dims = self.dims
        if not dims.ffn:
            yield self._axis("mlp", ())
            return
        mlp = [
            self._slice(role, self._rows(role, dims.ffn, 1))
            for role in ("up", "gate")
            if role in self.family.roles
        ]
        mlp.append(self._slice("down", torch.arange(dims.ffn)[:, None]))
        yield self._axis("mlp", tuple(mlp), torch.zeros(dims.ffn, dtype=torch.int64))

    def _sublayer(self, half: str) -> Axis:
        """Attention or MLP as one unit: every output, and what the last linear reads."""
        own = [linear for linear in self.linears.values() if half_of(linear.roles[0]) == half]
        if not own:
            return self._axis(f"{half}_sublayer", ())
        last = self.linears[self.path("o" if half == "attention" else "down")]
        # The outputs of the last linear are no other axis's: they say whether the unit is there.
        ends = [(last.name, "out", last.rows), (last.name, "in", last.cols)]
        ends += [(one.name, "out", one.rows) for one in own if one is not last]
        slices = tuple(
            Slice(module=name, side=side, index=torch.arange(size)[None])  # type: ignore[arg-type]
            for name, side, size in ends
        )
        place, parts = f"{self.family.blocks}.{self.number}", self.family.sublayers[half]
        return replace(
            self._axis(f"{half}_sublayer", slices, torch.zeros(1, dtype=torch.int64)),
            own=self._own(parts, {linear.name.removeprefix(f"{place}.") for linear in own}),
            stream=(
                f"{place}.{parts.before}",
                f"{place}.{parts.after}" if parts.after else last.name,
            ),
        )

    def _own(self, parts: Sublayer, linears: set[str]) -> int:
        """Parameters of a sublayer outside its linears."""
        total = 0
        for path in (*parts.norms, *parts.modules):
            for name, parameter in _module(self.block, path, self.family).named_parameters(path):
                owner = name.replace(".base_layer", "").rpartition(".")[0]
                if owner not in linears and not is_adapter_parameter(name):
                    total += full_shape(parameter).numel()
        return total

    def _axis(self, kind: str, slices: tuple[Slice, ...], group: Tensor = _NONE) -> Axis:
        size = len(group)
        return Axis(
            name=f"layers.{self.number}.{kind}",
            kind=kind,
            block=self.number,
            slices=slices,
            origin=torch.arange(size),
            group=group,
            dense_size=size,
        )


def _module(root: nn.Module, path: str, family: Family) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise FamilyError(
            f"module missing for family {family.name}",
            given=f"{type(root).__name__} without {path}",
            allowed="a causal language model of that family",
            fix="load the model with AutoModelForCausalLM, or correct the family file",
        ) from error


def _fixed_parameters(
    model: nn.Module, family: Family, linears: dict[str, Linear]
) -> tuple[int, int, int]:
    """(norms and the like inside blocks, embedding and head, all else), tied tensors once."""
    inside = embedding = outside = 0
    # named_parameters yields a tied tensor once, under its first name.
    for name, parameter in model.named_parameters():
        owner = name.replace(".base_layer", "").rpartition(".")[0]
        if is_adapter_parameter(name) or owner in linears:
            continue
        if name.startswith(f"{family.blocks}."):
            inside += full_shape(parameter).numel()
        elif owner in (family.embed, family.head):
            embedding += full_shape(parameter).numel()
        else:
            outside += full_shape(parameter).numel()
    return inside, embedding, outside
