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

from plprune.errors import CheckpointError, ConfigError, ExportError
from plprune.sharded import any_sharded, full_shape, is_sharded, whole, write
from plprune.surgery.linear_like import base_of, is_adapter_parameter, is_lora
from plprune.unwrap import family_of, unwrap

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


def inject(model: nn.Module, config: Mapping[str, Any]) -> Injected:
    """Put LoRA adapters on a model in place and freeze everything else.

    Args:
        model: plain Hugging Face model.
        config: arguments of `peft.LoraConfig`; `target_modules` defaults to all linears of the
            blocks.

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
    _require_pairs(settings)
    _require_whole(plain, settings)
    try:
        lora = LoraConfig(**settings)
        with _complete_shapes(plain):
            tuner = LoraModel(plain, {ADAPTER: lora}, ADAPTER)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "peft refused the LoRA config", given=str(error), fix="see peft.LoraConfig"
        ) from error
    return Injected(model=plain, tuner=tuner, config=settings, trained=trained)


def require_mergeable(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse adapters that could not be folded into the weights, before they are trained.

    Args:
        model: plain or wrapped model, adapters on it or not.
        config: arguments of `peft.LoraConfig`.

    Raises:
        ConfigError: for adapters on a tensor that two modules share, and biases that linears have
            no place for.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    plain = unwrap(model)
    family = family_of(plain)
    embed, head = (base_of(plain.get_submodule(path)) for path in (family.embed, family.head))
    try:
        lora = LoraConfig(**{"target_modules": target_modules(plain), **config})
    except (TypeError, ValueError):
        return  # said when they are put on
    paths = [
        n for n, m in plain.named_modules() if isinstance(base_of(m), (nn.Linear, nn.Embedding))
    ]
    hit = [path for path in paths if check_target_module_exists(lora, path)]
    tied = [path for path in hit if path in (family.embed, family.head)]
    if tied and embed.weight is head.weight:
        raise ConfigError(
            "adapters on tied embeddings cannot be merged",
            given=f"lora.config.target_modules with {tied[0]}",
            allowed="linears of the blocks: embedding and head are one tensor in this model",
            fix=f"leave {tied[0].rpartition('.')[2]} out, or set lora.merge: false",
        )
    bare = [
        path for path in hit if getattr(base_of(plain.get_submodule(path)), "bias", None) is None
    ]
    if config.get("lora_bias") and bare:
        raise ConfigError(
            "adapters with biases cannot be merged into linears without",
            given=f"lora.config.lora_bias: true, and {bare[0]} has no bias",
            allowed="lora_bias on linears that have one",
            fix="leave lora_bias out, or set lora.merge: false",
        )


def _require_pairs(settings: Mapping[str, Any]) -> None:
    """Refuse what peft trains beside its pairs of factors: nothing cuts, saves or merges it."""
    others = ("modules_to_save", "trainable_token_indices", "target_parameters")
    found = next((key for key in (*others, "layer_replication") if settings.get(key)), None)
    if found is not None:
        raise ConfigError(
            "these adapters cannot be cut and merged",
            given=f"lora.config.{found}: {settings[found]}",
            allowed="pairs of factors on linears, by target_modules",
            fix=f"leave {found} out; to train whole modules, leave `lora` out",
        )


def _require_whole(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse adapters that read the weights they are put on, where no process has them whole."""
    reads = settings.get("use_dora") or settings.get("init_lora_weights", True) not in (
        *(True, False),
        "gaussian",
    )
    if reads and any_sharded(model.parameters()):
        raise ConfigError(
            "these adapters need complete weights",
            given=f"use_dora: {settings.get('use_dora', False)}, "
            f"init_lora_weights: {settings.get('init_lora_weights', True)}, weights divided",
            allowed="LoRA with init_lora_weights true or gaussian, or strategy: ddp",
            fix="change lora.config",
        )


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


def require_same_adapters(given: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
    """Refuse adapters of another kind: their shapes may fit while their scale does not.

    Args:
        given: arguments of `peft.LoraConfig`; keys that are left out are not compared.
        saved: those of the checkpoint; None if it does not say.

    Raises:
        CheckpointError: naming the first argument that differs.
    """
    for name, value in (saved or {}).items():
        if name in given and _sorted(given[name]) != _sorted(value):
            raise CheckpointError(
                "the adapters in the checkpoint are of another kind",
                given=f"lora.config.{name}: {given[name]}",
                allowed=f"{value}, as in the checkpoint",
                fix="use the config of the run",
            )
    extra = sorted(set(given) - set(saved or given))
    if extra:
        raise CheckpointError(
            "the adapters in the checkpoint are of another kind",
            given=f"lora.config.{extra[0]}: {given[extra[0]]}",
            allowed="no such setting, as in the checkpoint",
            fix="use the config of the run",
        )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that a checkpoint can hold: those of plain types."""
    plain = (str, int, float, list, dict, type(None))
    values = {name: _sorted(value) for name, value in config.items()}
    return {name: value for name, value in values.items() if isinstance(value, plain)}


def _sorted(value: Any) -> Any:
    """Comparable: peft takes lists, tuples and sets of names."""
    return sorted(value) if isinstance(value, (list, tuple, set, frozenset)) else value


def target_modules(model: nn.Module) -> list[str]:
    """Last path components of the linears of a block, as peft names targets."""
    roles = family_of(model).roles.values()
    return sorted({projection.path.rpartition(".")[2] for projection in roles})


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
            cast(Any, module).merge()
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
    real.merge()
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
