"""LoRA on a model that is cut: inject, merge, save and load adapters that know their structure.

peft's tuner changes the linears in place, so the Hugging Face model keeps its class and its place
in the user's module; surgery cuts factors together with their linears.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.errors import ConfigError, ExportError, StructureError
from plprune.sharded import is_sharded
from plprune.spec import Spec
from plprune.surgery.linear_like import is_adapter_parameter, is_lora
from plprune.unwrap import family_of, unwrap

ADAPTER = "default"
HASH_KEY = "plprune_structure"


@dataclass(frozen=True, kw_only=True, eq=False)
class Injected:
    """Adapters in a model."""

    model: nn.Module
    """The Hugging Face model, its linears wrapped."""
    tuner: Any
    """peft's `LoraModel`."""
    config: dict[str, Any]
    """peft configuration as given."""
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
    _require_whole(plain, settings)
    try:
        lora = LoraConfig(**settings)
        with _complete_shapes(plain):
            tuner = LoraModel(plain, {ADAPTER: lora}, ADAPTER)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "peft refused the LoRA config", given=str(error), fix="see peft.LoraConfig"
        ) from error
    return Injected(model=plain, tuner=tuner, config=dict(config), trained=trained)


def _require_whole(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse adapters that read the weights they are put on, where no process has them whole."""
    reads = settings.get("use_dora") or settings.get("init_lora_weights", True) not in (
        *(True, False),
        "gaussian",
    )
    if reads and any(is_sharded(parameter) for parameter in model.parameters()):
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
                stand_in = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
                hidden.append((module, name, parameter))
                module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in hidden:
            parameter.requires_grad_(False)  # as peft did with the stand-in
            module._parameters[name] = parameter


def target_modules(model: nn.Module) -> list[str]:
    """Last path components of the linears of a block, as peft names targets."""
    roles = family_of(model).roles.values()
    return sorted({projection.path.rpartition(".")[2] for projection in roles})


def merge(injected: Injected) -> None:
    """Fold the adapters into the weights and take them off; the model is plain again.

    Args:
        injected: from `inject`.

    Raises:
        ExportError: if a merged weight is not finite; the model is left with its adapters then.
    """
    for name, module in injected.model.named_modules():
        if is_lora(module):
            delta = cast(Any, module).get_delta_weight(ADAPTER)
            if not bool(torch.isfinite(delta).all()):
                raise ExportError(
                    "cannot merge adapters",
                    given=f"NaN or infinity in {name}",
                    allowed="finite factors",
                )
    injected.tuner.merge_and_unload()
    for name, parameter in injected.model.named_parameters():
        parameter.requires_grad_(name in injected.trained)


def structure_hash(spec: Spec) -> str:
    """Hash of the widths an adapter was trained on."""
    shapes = {name: [linear.rows, linear.cols] for name, linear in spec.linears.items()}
    return hashlib.sha256(
        json.dumps([spec.fingerprint, shapes], sort_keys=True).encode()
    ).hexdigest()[:16]


def save_adapter(
    injected: Injected, directory: Path, spec: Spec, *, overwrite: bool = False
) -> Path:
    """Write adapters that peft alone can load, with the hash of the structure they fit.

    Args:
        injected: adapters in a model.
        directory: target; written beside under a temporary name, then renamed.
        spec: of the model as it is.
        overwrite: replace an existing directory.

    Returns:
        The directory.

    Raises:
        ExportError: if it exists, or an adapter tensor is empty or not finite.
    """
    from safetensors.torch import save_file

    if directory.exists() and not overwrite:
        raise ExportError(
            "the adapter directory exists", given=str(directory), fix="choose another or overwrite"
        )
    tensors = adapter_state(injected.model)
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                "adapter tensor is empty or not finite", given=f"{name} {tuple(tensor.shape)}"
            )
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        injected.tuner.peft_config[ADAPTER].save_pretrained(str(temporary))
        # Not in adapter_config.json: peft warns about keys it does not know.
        metadata = {"format": "pt", HASH_KEY: structure_hash(spec)}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata=metadata)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors under the names peft uses on disk.

    Args:
        model: plain model with injected adapters.

    Returns:
        `base_model.model.<path>.lora_A.weight` and so on, contiguous, on the CPU.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if is_adapter_parameter(name):
            public = f"base_model.model.{name}".replace(f".{ADAPTER}.", ".")
            if "lora_magnitude_vector" in public:
                public = public.removesuffix(".weight")
            state[public] = tensor.detach().cpu().contiguous()
    return state


def load_adapter(model: nn.Module, directory: Path, spec: Spec) -> Injected:
    """Put saved adapters on a model, refusing another structure.

    Args:
        model: plain Hugging Face model.
        directory: written by `save_adapter`.
        spec: of `model`.

    Returns:
        The adapters, trainable.

    Raises:
        StructureError: if the adapter was trained on another structure, is damaged, or does not say
            which.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            wanted = (file.metadata() or {}).get(HASH_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise StructureError(
            "not a readable adapter", given=str(directory), allowed="a saved adapter"
        ) from error
    found = structure_hash(spec)
    if wanted != found:
        raise StructureError(
            "the adapter belongs to another structure",
            given=f"structure {wanted} in {directory.name}",
            allowed=f"{found}, the model in memory",
            fix="load the pruned model this adapter was trained on",
        )
    keep = (
        *("r", "lora_alpha", "lora_dropout", "bias", "lora_bias", "use_dora", "use_rslora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    )
    injected = inject(model, {key: config[key] for key in keep if config.get(key) is not None})
    _fill(injected.model, tensors)
    return injected


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved adapter tensors into the adapters of a model."""
    own = {name: value for name, value in model.state_dict().items() if is_adapter_parameter(name)}
    public = dict(zip(adapter_state(model), own.values(), strict=True))
    if public.keys() != tensors.keys():
        raise StructureError(
            "adapter tensors do not fit", given=str(sorted(tensors.keys() ^ public.keys())[:3])
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            public[name].copy_(tensor)


def any_adapter(model: nn.Module) -> bool:
    """True if the model has LoRA adapters that are not merged."""
    return any(is_lora(module) for module in model.modules())


def any_dora(model: nn.Module) -> bool:
    """True if the model has DoRA adapters, whose scale is a norm over all columns of a weight."""
    return any(getattr(module, "lora_magnitude_vector", None) for module in model.modules())
