"""Weights as a model computes with them, and how a linear comes to compute with others.

Legend: R rows, C columns of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.errors import PlanError
from plprune.plan import Mask, Plan, Write
from plprune.sharded import whole
from plprune.surgery.linear_like import base_of, is_conv1d, is_lora


def weight_of(module: nn.Module) -> Tensor:
    """The weight a linear computes with, adapters included; collective for divided weights.

    Args:
        module: Linear, Conv1D, or a peft LoRA layer around one.

    Returns:
        [R, C], detached; of a plain linear the weight itself.
    """
    base = base_of(module)
    stored = whole(cast(Tensor, base.weight)).detach()
    weight_RC = stored.T if is_conv1d(base) else stored
    total = exact_RC = weight_RC.double() if _adapted(module) else weight_RC
    for name, delta in _deltas(module):
        magnitudes = getattr(module, "lora_magnitude_vector", {})
        if name in magnitudes:  # DoRA gives every row of the sum a norm of its own
            norm_R = whole(magnitudes[name].weight).detach().double().flatten()
            scale_R = norm_R / (exact_RC + delta).norm(dim=1)
            delta = scale_R[:, None] * (exact_RC + delta) - exact_RC
        total = total + delta
    if total is exact_RC:
        return weight_RC
    # Rounded to bfloat16 the sum would lose what the adapters learnt.
    return total.to(torch.promote_types(weight_RC.dtype, torch.float32))


def bias_of(module: nn.Module) -> Tensor | None:
    """[R] bias of a linear, None without one; collective for divided weights."""
    bias = cast(Tensor | None, base_of(module).bias)
    return None if bias is None else whole(bias).detach()


def new_values(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What the `Write` and `Mask` edits of a plan change; collective for divided weights.

    Args:
        model: plain Hugging Face model, in the coordinates of the plan.
        plan: biases that do not exist yet are left out.

    Yields:
        Parameters and their complete new values.

    Raises:
        PlanError: as `weight_of`.
    """
    masks = {edit.module: edit.keep for edit in plan.edits if isinstance(edit, Mask)}
    writes = {edit.module: edit for edit in plan.edits if isinstance(edit, Write)}
    for name in {**writes, **masks}:
        module, edit = model.get_submodule(name), writes.get(name)
        base = base_of(module)
        parameter = cast(nn.Parameter, base.weight)
        if name in masks or (edit is not None and edit.weight is not None):
            values = _base_values(module, edit)
            if name in masks:
                values = values * masks[name].to(values.device)
            yield parameter, (values.T if is_conv1d(base) else values).to(parameter.dtype)
        if edit is not None and edit.bias is not None and base.bias is not None:
            yield cast(nn.Parameter, base.bias), edit.bias.to(parameter.dtype)


def _base_values(module: nn.Module, edit: Write | None) -> Tensor:
    """[R, C] that the base weight takes, masks not applied yet."""
    base = base_of(module)
    if edit is None or edit.weight is None:
        stored = whole(cast(Tensor, base.weight)).detach()
        return stored.T if is_conv1d(base) else stored
    delta = _adapters(module)
    return edit.weight if delta is None else edit.weight.to(delta.device).double() - delta


def require_writable(model: nn.Module, plan: Plan) -> None:
    """Refuse new weights under DoRA, before anything is changed.

    Args:
        model: plain Hugging Face model.
        plan: any.

    Raises:
        PlanError: naming the setting.
    """
    for edit in plan.edits:
        if isinstance(edit, Write) and edit.weight is not None:
            _adapters(model.get_submodule(edit.module))


def dora_refitted() -> PlanError:
    """What to say of refits under DoRA, whose scale is a norm over all columns."""
    return PlanError(
        "weights under DoRA adapters cannot be refitted",
        given="use_dora: true",
        allowed="LoRA without it, or no compensation",
        fix="leave lora.config.use_dora out, or start the adapters after the cuts",
    )


def _adapters(module: nn.Module) -> Tensor | None:
    """[R, C] float64 that active adapters add to the base weight; None if there are none."""
    total: Tensor | None = None
    for name, delta in _deltas(module):
        if name in getattr(module, "lora_magnitude_vector", {}):
            raise dora_refitted()
        total = delta if total is None else total + delta
    return total


def _adapted(module: nn.Module) -> bool:
    layer: Any = module
    return is_lora(module) and not layer.merged and not layer.disable_adapters


def _deltas(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and [R, C] float64 product of every active adapter of a layer."""
    if not _adapted(module):
        return
    layer: Any = module
    for name in layer.active_adapters:
        if name in layer.lora_A:
            up, down = (whole(getattr(layer, f"lora_{x}")[name].weight).detach() for x in "BA")
            yield name, layer.scaling[name] * (up.double() @ down.double())
