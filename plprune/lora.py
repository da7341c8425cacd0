"""LoRA on a model that is cut: put adapters on it, merge them.

peft's tuner changes the linears in place, so the Hugging Face model keeps its class and its place
in the user's module; surgery cuts factors together with their linears.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.errors import ConfigError, ExportError, first_line
from plprune.lora_config import require_pairs, require_whole, target_modules
from plprune.lora_zeros import keep_zeros, merge_layer, require_keepable
from plprune.sharded import full_shape, is_sharded, whole, write
from plprune.surgery.linear_like import is_adapter_parameter, is_lora
from plprune.unwrap import unwrap

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True, eq=False)
class Injected:
    """Adapters in a model."""

    model: nn.Module
    """The Hugging Face model, its linears wrapped."""
    tuner: Any
    """peft's `LoraModel`."""
    config: dict[str, Any]
    """Arguments of `peft.LoraConfig`, with our defaults."""
    trained: frozenset[str]
    """Names of the parameters that were trainable before."""
    zeros: bool = False
    """Whether zeros of the weights stay."""


def inject(model: nn.Module, config: Mapping[str, Any], *, zeros: bool = False) -> Injected:
    """Put LoRA adapters on a model in place and freeze everything else.

    Args:
        model: plain Hugging Face model.
        config: arguments of `peft.LoraConfig`; `target_modules` defaults to all linears of the
            blocks.
        zeros: leave zeros of the weights at zero; see `lora_zeros`.

    Returns:
        The adapters.

    Raises:
        ConfigError: for arguments peft does not know or that match no module.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    plain = unwrap(model)
    if any(is_lora(module) for module in plain.modules()):
        raise ConfigError(
            "the model has LoRA adapters already",
            given="two injections",
            fix="merge the first ones",
        )
    trained = frozenset(
        name for name, parameter in plain.named_parameters() if parameter.requires_grad
    )
    settings = {"target_modules": target_modules(plain), "r": 16, "lora_alpha": 32, **config}
    require_pairs(settings)
    require_whole(plain, settings)
    if zeros:
        require_keepable(settings)
    try:
        lora = LoraConfig(**settings)
        with _complete_shapes(plain):
            tuner = LoraModel(plain, {ADAPTER: lora}, ADAPTER)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            "peft refused the LoRA config",
            given=f"lora.config {dict(config)} ({first_line(error)})",
            allowed="arguments of their types, for what is installed",
            fix="see peft.LoraConfig",
        ) from error
    if zeros:
        keep_zeros(plain)
    return Injected(model=plain, tuner=tuner, config=settings, trained=trained, zeros=zeros)


@contextlib.contextmanager
def _complete_shapes(model: nn.Module) -> Iterator[None]:
    """Let divided weights look complete: peft takes their parts for tensor-parallel linears."""
    hidden: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                # One number that claims to be a matrix; nothing reads it.
                stand_in = torch.empty((), dtype=parameter.dtype).expand(full_shape(parameter))
                hidden.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in hidden:
            parameter.requires_grad_(False)  # as peft did with the stand-in
            module._parameters[name] = parameter


def merge(injected: Injected) -> None:
    """Fold the adapters into the weights and take them off; the model is plain again.

    Args:
        injected: from `inject`.

    Raises:
        ExportError: if a factor is not finite; the model is left with its adapters then.
    """
    layers = [(name, m) for name, m in injected.model.named_modules() if is_lora(m)]
    for name, module in layers:
        named = module.named_parameters()
        # On the meta device there are shapes only; `merged` looks at the numbers then.
        factors = (p for n, p in named if is_adapter_parameter(n) and not p.is_meta)
        if not all(bool(torch.isfinite(whole(factor).detach()).all()) for factor in factors):
            raise _not_finite(name)
    for _, module in layers:
        with _complete(module):
            merge_layer(module)
    injected.tuner.unload()
    for name, parameter in injected.model.named_parameters():
        parameter.requires_grad_(name in injected.trained)


def merged(layer: nn.Module, read: Callable[[str], Tensor]) -> nn.Module:
    """The linear that one adapted layer becomes, from weights that are elsewhere.

    Args:
        layer: of peft, on the meta device; not changed.
        read: a tensor by its name in the layer.

    Returns:
        The linear, with the adapters folded in.

    Raises:
        ExportError: if a factor is not finite.
    """
    real: Any = copy.deepcopy(layer)
    for name, empty in list(real.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = read(name).to(empty.dtype)
        if is_adapter_parameter(name) and not bool(torch.isfinite(tensor).all()):
            raise _not_finite(name)
        filled = nn.Parameter(tensor, requires_grad=False)
        real.get_submodule(owner)._parameters[leaf] = filled
    merge_layer(real)
    return cast(nn.Module, real.get_base_layer())


def _not_finite(name: str) -> ExportError:
    return ExportError(
        "cannot merge adapters", given=f"NaN or infinity in {name}", allowed="finite factors"
    )


@contextlib.contextmanager
def _complete(module: nn.Module) -> Iterator[None]:
    """Let one layer with divided weights work on complete ones; what it changes is kept."""
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and is_sharded(parameter):
                held.append((part, name, parameter))
                full = whole(parameter).detach().clone()
                part._parameters[name] = nn.Parameter(full, requires_grad=False)
    yield
    for part, name, parameter in held:
        full = cast(Tensor, part._parameters[name]).detach()
        part._parameters[name] = parameter
        write(parameter, full)


def any_adapter(model: nn.Module) -> bool:
    """True if the model has LoRA adapters that are not merged."""
    return any(is_lora(module) for module in model.modules())


def any_dora(model: nn.Module) -> bool:
    """True if the model has DoRA adapters, whose scale is a norm over all columns of a weight."""
    return any(getattr(module, "lora_magnitude_vector", None) for module in model.modules())
