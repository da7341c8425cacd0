"""Which dimension of which parameter belongs to which side of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from plprune import sharded
from plprune.errors import FamilyError
from plprune.spec import Side

Dims = Mapping[str, Mapping[Side, int]]
"""Parameter name relative to the module -> {side: dimension}."""

_ADAPTER_PARTS = (
    "lora_A",
    "lora_B",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
)


def is_adapter_parameter(name: str) -> bool:
    """True for parameters that peft adds to a model."""
    return any(part in _ADAPTER_PARTS for part in name.split("."))


def is_lora(module: nn.Module) -> bool:
    """True for a peft LoRA layer around a linear."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def base_of(module: nn.Module) -> nn.Module:
    """The linear itself, also inside a peft LoRA layer."""
    return cast(nn.Module, module.base_layer) if is_lora(module) else module


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D`, a linear with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_removed(module: nn.Module) -> bool:
    """True for what stands where a module of a removed sublayer was."""
    return bool(getattr(module, "plprune_removed", False))


def is_norm(module: nn.Module) -> bool:
    """True for LayerNorm and any RMSNorm: one weight vector (and bias) over the residual width."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and "norm" in type(module).__name__.lower()


def dims(module: nn.Module) -> Dims:
    """Dimensions of a module's parameters by side.

    Args:
        module: Linear, transformers' Conv1D, Embedding, LayerNorm, RMSNorm, or a peft LoRA layer
            around a linear.

    Returns:
        For every parameter that follows a side, the dimension that is cut with it.

    Raises:
        FamilyError: for a module surgery does not know.
    """
    if is_lora(module):
        table: dict[str, Mapping[Side, int]] = {
            f"base_layer.{name}": sides for name, sides in dims(base_of(module)).items()
        }
        for adapter in cast(nn.ModuleDict, module.lora_A):
            table[f"lora_A.{adapter}.weight"] = {"in": 1}
            table[f"lora_B.{adapter}.weight"] = {"out": 0}
            table[f"lora_B.{adapter}.bias"] = {"out": 0}
            table[f"lora_magnitude_vector.{adapter}.weight"] = {"out": 0}
        return table
    if isinstance(module, nn.Linear):
        return {"weight": {"out": 0, "in": 1}, "bias": {"out": 0}}
    if is_conv1d(module):
        return {"weight": {"out": 1, "in": 0}, "bias": {"out": 0}}
    if isinstance(module, nn.Embedding):
        return {"weight": {"out": 1}}
    if is_norm(module):
        return {"weight": {"out": 0}, "bias": {"out": 0}}
    raise FamilyError(
        "cannot cut this kind of module",
        given=type(module).__name__,
        allowed="Linear, Conv1D, Embedding, LayerNorm, RMSNorm, peft LoRA around a linear",
        fix="load the model without quantisation and without other adapters",
    )


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(rows, columns) of a linear, independent of how its weight is stored.

    Args:
        module: Linear, Conv1D, or a peft LoRA layer around one.

    Returns:
        Outputs and inputs.
    """
    sides = dims(base_of(module))["weight"]
    shape = sharded.full_shape(cast(nn.Parameter, base_of(module).weight))
    return shape[sides["out"]], shape[sides["in"]]


def refresh_sizes(module: nn.Module) -> None:
    """Make the size attributes of a cut module tell the truth again.

    Args:
        module: a module whose parameters were just replaced.
    """
    if is_lora(module):
        refresh_sizes(base_of(module))
        rows, cols = shape_of(module)
        module.in_features, module.out_features = cols, rows  # type: ignore[assignment]
        for factor in cast(nn.ModuleDict, module.lora_A).values():
            factor.in_features = cols  # type: ignore[assignment]
        for factor in cast(nn.ModuleDict, module.lora_B).values():
            factor.out_features = rows  # type: ignore[assignment]
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = sharded.full_shape(module.weight)
    elif is_conv1d(module):
        module.nx, module.nf = sharded.full_shape(cast(nn.Parameter, module.weight))  # type: ignore[assignment]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = sharded.full_shape(module.weight)[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(sharded.full_shape(module.weight))
