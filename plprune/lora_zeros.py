"""LoRA around zeros: adapters neither move them while they train nor fill them when merged.

The layer computes x (W + (B A) . [W != 0])^T, so that the merged weight is what was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.errors import ConfigError
from plprune.sharded import is_gathered_late
from plprune.surgery.linear_like import base_of, is_conv1d, is_lora

log = logging.getLogger(__name__)

_KEEP = "plprune_keeps_zeros"


def require_keepable(settings: Mapping[str, Any]) -> None:
    """Refuse adapters whose product with an input is more than that of their two factors.

    Args:
        settings: arguments of `peft.LoraConfig`.

    Raises:
        ConfigError: naming the argument.
    """
    found = next((k for k in ("use_dora", "lora_dropout", "lora_bias") if settings.get(k)), None)
    if found is not None:
        raise ConfigError(
            "these adapters cannot be trained around zeros",
            given=f"lora.config.{found}: {settings[found]}, and a model with zeros",
            allowed="pairs of factors without dropout",
            fix=f"leave {found} out, or set lora.keep_zeros: false, which fills the zeros",
        )


def keep_zeros(model: nn.Module) -> None:
    """Let all adapters of a model leave zeros of the weights they are on at zero.

    Where a strategy puts weights together layer by layer (ZeRO-3) they are not at hand when the
    product of the factors is: there adapters train as ever, and only the merge leaves zeros alone.

    Args:
        model: plain Hugging Face model with LoRA layers.
    """
    late = False
    for module in model.modules():
        if is_lora(module) and getattr(module, "lora_A", None):
            setattr(module, _KEEP, True)
            if is_gathered_late(cast(Tensor, base_of(module).weight)):
                late = True
            else:
                module.register_forward_hook(_without_filled)
    if late:
        log.warning("adapters train as if there were no zeros; their merge leaves zeros at zero")


def merge_layer(layer: nn.Module) -> None:
    """Fold one adapter into its weight; zeros of that stay if it was told to keep them.

    Args:
        layer: of peft, with complete tensors.
    """
    base = base_of(layer)
    weight = cast(nn.Parameter, base.weight)
    stays = weight.detach() != 0 if getattr(layer, _KEEP, False) else None
    cast(Any, layer).merge()
    if stays is not None:
        with torch.no_grad():
            cast(nn.Parameter, base.weight).mul_(stays)


def _without_filled(layer: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Take from a layer's output what its product gives at zeros of its weight."""
    base, x = base_of(layer), args[0]
    weight = cast(Tensor, base.weight)
    dead = (weight.T if is_conv1d(base) else weight) == 0
    for name in layer.active_adapters:
        first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
        filled = (second @ first) * layer.scaling[name] * dead
        out = out - nn.functional.linear(x.to(filled.dtype), filled).to(out.dtype)
    return out
