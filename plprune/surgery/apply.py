"""Apply a plan: the one place that changes a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.errors import PlanError
from plprune.families.base import Family
from plprune.plan import Keep, Plan, Write
from plprune.sharded import parameter_like, write
from plprune.spec import Entry, Lowered, Spec
from plprune.surgery.linear_like import base_of, is_conv1d, is_lora, is_removed, refresh_sizes
from plprune.surgery.lower import lower
from plprune.surgery.removal import leaving, remove, renumber
from plprune.surgery.state import CutTable, Swap, cut, cut_table
from plprune.surgery.written import new_values, require_writable
from plprune.unwrap import family_of, unwrap


@dataclass(frozen=True, kw_only=True, eq=False)
class Applied:
    """What a cut did."""

    spec: Spec
    """The model after the cut."""
    swaps: tuple[Swap, ...]
    """Parameters that were replaced."""
    table: CutTable
    """Cuts by parameter name."""
    gone: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """Parameters of sublayers that were removed, by name."""


def apply(model: nn.Module, plan: Plan, spec: Spec) -> Applied:
    """Apply a plan to a model: Write, then Mask, then Keep.

    Args:
        model: the model `spec` describes; changed in place, its parameters that shrink are
            replaced.
        plan: made for `spec`.
        spec: spec of the model as it is.

    Returns:
        The new spec and what was replaced; the optimizer is the caller's, see `slice_optimizer`.

    Raises:
        PlanError: if the plan does not fit; nothing is changed then.
    """
    lowered = lower(plan, spec)
    plain = unwrap(model)
    spec = check_edits(plan, spec)
    _check_shared(plain, cut_table(plain, kept_entries(spec, lowered)))
    require_writable(plain, plan)
    _write(plain, plan)
    return commit(plain, spec, lowered)


def commit(model: nn.Module, spec: Spec, lowered: Lowered) -> Applied:
    """Cut the tensors down to the kept entries.

    Args:
        model: plain or wrapped model in the coordinates of `spec`.
        spec: its spec; entries it lists as dead are dropped too.
        lowered: kept entries by (module, side).

    Returns:
        The new spec and the replaced parameters.

    Raises:
        PlanError: if tensors that two modules share would not be cut alike; nothing is changed
            then.
    """
    plain = unwrap(model)
    keep = kept_entries(spec, lowered)
    after = spec.cut(keep, physical=True)
    table = cut_table(plain, keep)
    _check_shared(plain, table)
    family, there = family_of(plain), after.linears
    removed = leaving(spec, after)
    gone = remove(plain, family, removed)
    norms = _dora_norms(plain, {entry: mask for entry, mask in keep.items() if entry[0] in there})
    swaps = _swap(plain, table)
    for path in {path for path, _ in keep if path in there}:
        refresh_sizes(plain.get_submodule(path))
    _rescale_dora(plain, norms)
    _refresh_counters(plain, family, after)
    if removed:
        renumber(plain, family)
    return Applied(spec=after, swaps=tuple(swaps), table=table, gone=gone)


def _swap(model: nn.Module, table: CutTable) -> list[Swap]:
    done: dict[nn.Parameter, Swap] = {}
    swaps = []
    for name, cuts in table.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        old = cast(nn.Parameter, owner._parameters[leaf])
        if old in done:  # a tensor shared by two modules is cut once
            owner._parameters[leaf] = done[old].new
            continue
        with torch.no_grad():
            new = parameter_like(cut(old, cuts).detach(), old)
        if old.grad is not None:
            new.grad = cut(old.grad, cuts)
        owner._parameters[leaf] = new
        done[old] = Swap(name=name, old=old, new=new, cuts=cuts)
        swaps.append(done[old])
    return swaps


def kept_entries(spec: Spec, lowered: Lowered) -> dict[Entry, Tensor]:
    """Kept entries, without those that are masked already.

    Args:
        spec: with its dead entries.
        lowered: kept entries of a cut.

    Returns:
        Kept entries of both.
    """
    keep = {entry: ~dead for entry, dead in spec.dead.items()}
    for entry, mask in lowered.items():
        keep[entry] = keep[entry] & mask if entry in keep else mask
    return keep


def _check_shared(model: nn.Module, table: CutTable) -> None:
    """Tensors that hang in several modules must lose the same entries in all of them."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for first, *others in names.values():
        for other in others:
            one, two = table.get(first, ()), table.get(other, ())
            if len(one) != len(two) or any(
                a[0] != b[0] or not torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True)
            ):
                raise PlanError(
                    "two modules share a tensor but lose different entries",
                    given=f"{first} and {other}",
                    fix="untie them, or leave their axis out of the plan",
                )


def check_edits(plan: Plan, spec: Spec) -> Spec:
    """Refuse edits that fit no linear.

    Args:
        plan: any.
        spec: of the model.

    Returns:
        The spec with the biases the plan adds.

    Raises:
        PlanError: naming the linear.
    """
    linears = dict(spec.linears)
    for edit in plan.edits:
        if isinstance(edit, Keep):
            continue
        linear = linears.get(edit.module)
        if linear is None:
            raise PlanError(
                f"cannot edit {edit.module}",
                given="no such linear",
                allowed=f"{next(iter(linears))}, ...",
            )
        matrix, vector = (linear.rows, linear.cols), (linear.rows,)
        wanted = {"weight": matrix, "keep": matrix, "bias": vector}
        for name, tensor in vars(edit).items():
            if isinstance(tensor, Tensor) and tensor.shape != wanted[name]:
                raise PlanError(
                    f"cannot edit {edit.module}",
                    given=f"{name} of shape {tuple(tensor.shape)}",
                    allowed=str(wanted[name]),
                )
        if isinstance(edit, Write) and edit.bias is not None:
            linears[edit.module] = replace(linear, bias=True)
    return replace(spec, linears=linears)


def _write(model: nn.Module, plan: Plan) -> None:
    for parameter, values in new_values(model, plan):
        write(parameter, values)
    for edit in plan.edits:
        if isinstance(edit, Write) and edit.bias is not None:
            _add_bias(base_of(model.get_submodule(edit.module)), edit.bias)


def _add_bias(base: nn.Module, bias: Tensor) -> None:
    weight = cast(nn.Parameter, base.weight)
    if cast("nn.Parameter | None", base.bias) is None:
        base.bias = nn.Parameter(
            bias.to(weight.device, weight.dtype), requires_grad=weight.requires_grad
        )


def _dora_norms(model: nn.Module, keep: Lowered) -> dict[tuple[str, str], Tensor]:
    """Row norms of W + BA of every DoRA layer that loses inputs, rows that stay only.

    DoRA scales each row by magnitude / norm; dropping columns shrinks the norm, so the magnitude
    follows.
    """
    norms = {}
    for path, side in keep:
        module = model.get_submodule(path)
        if side == "in" and is_lora(module):
            for adapter in _dora_adapters(module):
                norm_R = _row_norms(module, adapter)
                rows = keep.get((path, "out"))
                norms[path, adapter] = norm_R if rows is None else norm_R[rows.to(norm_R.device)]
    return norms


def _rescale_dora(model: nn.Module, before: dict[tuple[str, str], Tensor]) -> None:
    for (path, adapter), norm_R in before.items():
        module: Any = model.get_submodule(path)
        magnitude = module.lora_magnitude_vector[adapter].weight
        with torch.no_grad():
            magnitude.mul_((_row_norms(module, adapter) / norm_R).to(magnitude.dtype))


def _dora_adapters(module: nn.Module) -> list[str]:
    return list(getattr(module, "lora_magnitude_vector", {}).keys())


def _row_norms(module: Any, adapter: str) -> Tensor:
    with torch.no_grad():
        base = base_of(module)
        weight = base.weight.T if is_conv1d(base) else base.weight
        delta = module.lora_B[adapter].weight @ module.lora_A[adapter].weight
        total: Tensor = weight.double() + module.scaling[adapter] * delta.double()
        return cast(Tensor, torch.linalg.vector_norm(total, dim=1))


def _refresh_counters(model: nn.Module, family: Family, spec: Spec) -> None:
    """Refresh head counts and widths kept beside the weights, in modules and in the config."""
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    config: Any = model.config
    for block, numbers in zip(blocks, spec.blocks, strict=True):
        values = {**vars(numbers), "rep": numbers.heads // max(1, numbers.kv_heads)}
        for path, attributes in family.counters.items():
            if not is_removed(block.get_submodule(path)):
                for attribute, quantity in attributes.items():
                    setattr(block.get_submodule(path), attribute, values[quantity])
        for path in family.config_readers:
            reader: Any = block.get_submodule(path)
            if is_removed(reader):
                continue
            # Its forward reads head counts from the config: one private copy per block, or widths
            # could not differ.
            reader.config = copy.copy(reader.config)
            for quantity, attribute in family.dims.items():
                set_config(reader.config, attribute, values[quantity])
    widths = {"head_dim": "head_dim", **family.dims}
    found = {quantity: {vars(block)[quantity] for block in spec.blocks} for quantity in widths}
    found = {quantity: values - {0} for quantity, values in found.items()}  # 0: it was removed
    if all(len(values) < 2 for values in found.values()):
        for quantity, attribute in widths.items():
            for value in found[quantity]:
                set_config(config, attribute, value)


def set_config(config: Any, attribute: str, value: int) -> None:
    """Set a width in a Hugging Face config without its whole-config validation.

    Some stock configs refuse head counts that do not divide the hidden size although their modules
    run with them; what such a model may be saved as is the export's business.

    Args:
        config: the model's config, changed in place.
        attribute: field name.
        value: new value.
    """
    object.__setattr__(config, attribute, value)
