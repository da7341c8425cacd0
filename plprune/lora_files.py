"""Adapters on disk, as peft writes them, with the hash of the structure they fit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from plprune.errors import ExportError, StructureError
from plprune.export_depth import Closed
from plprune.lora import ADAPTER, Injected, inject
from plprune.sharded import state_of, whole
from plprune.spec import Spec
from plprune.surgery.linear_like import is_adapter_parameter

HASH_KEY = "plprune_structure"


def structure_hash(spec: Spec) -> str:
    """Hash of the widths an adapter was trained on."""
    shapes = {name: [linear.rows, linear.cols] for name, linear in spec.linears.items()}
    return hashlib.sha256(
        json.dumps([spec.fingerprint, shapes], sort_keys=True).encode()
    ).hexdigest()[:16]


def save_adapter(
    injected: Injected,
    directory: Path,
    spec: Spec,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    closed: Closed | None = None,
    overwrite: bool = False,
) -> Path:
    """Write adapters that peft alone can load, with the hash of the structure they fit.

    Args:
        injected: adapters in a model.
        directory: target; written beside under a temporary name, then renamed.
        spec: of the model as it is.
        tensors: from `adapter_state`, which all ranks must call where weights are divided; None
            calls it.
        closed: new numbers of blocks, where some are not written; None: all are.
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
    tensors = adapter_state(injected.model) if tensors is None else dict(tensors)
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                "adapter tensor is empty or not finite", given=f"{name} {tuple(tensor.shape)}"
            )
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        config = copy.copy(injected.tuner.peft_config[ADAPTER])
        # PiSSA and its like changed the base when they began: peft must not do that again.
        config.init_lora_weights = True
        if closed is not None:
            closed.adapter(config)
            tensors = {closed.name(name): tensor for name, tensor in tensors.items()}
        config.save_pretrained(str(temporary))
        # Not in adapter_config.json: peft warns about keys it does not know.
        metadata = {"format": "pt", HASH_KEY: structure_hash(spec)}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata=metadata)
        (temporary / "adapter_model.safetensors").chmod(0o644)  # safetensors makes private files
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def holds(directory: Path, spec: Spec, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder has just these adapters, from an earlier `save_adapter`.

    Args:
        directory: perhaps with adapters.
        spec: of the model as it is.
        tensors: from `adapter_state`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            names = set(file.keys())
            return (
                (file.metadata() or {}).get(HASH_KEY) == structure_hash(spec)
                and names == set(tensors)
                and all(torch.equal(file.get_tensor(name), tensors[name]) for name in names)
            )
    except (OSError, SafetensorError):
        return False


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter tensors under the names peft uses on disk.

    Args:
        model: plain model with injected adapters.

    Returns:
        `base_model.model.<path>.lora_A.weight` and so on, contiguous, on the CPU.
    """
    state = {}
    for name, tensor in state_of(model).items():
        if is_adapter_parameter(name):
            public = f"base_model.model.{name}".replace(f".{ADAPTER}.", ".")
            if "lora_magnitude_vector" in public:
                public = public.removesuffix(".weight")
            state[public] = whole(tensor).detach().cpu().contiguous()
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
        *("rank_pattern", "alpha_pattern", "fan_in_fan_out"),
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
