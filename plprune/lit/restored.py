"""The plain model of a checkpoint: base, structure, weights, adapters merged, masked units cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from plprune.describe import describe
from plprune.drivers.progressive import Progressive
from plprune.errors import CheckpointError, ConfigError
from plprune.lit.carry import KEY
from plprune.load import load_hf
from plprune.lora import inject, merge, require_same_adapters
from plprune.skeleton import config_of, skeleton
from plprune.spec import Spec
from plprune.surgery.apply import commit
from plprune.surgery.linear_like import is_adapter_parameter
from plprune.surgery.rebuild import structure_of
from plprune.unwrap import family_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Restored:
    """A model taken out of a checkpoint."""

    model: nn.Module
    """Plain Hugging Face model on the CPU."""
    spec: Spec
    """Its spec."""
    structure: dict[str, Any]
    """What is left of the dense model."""
    base: str
    """The dense model."""


def restore(
    checkpoint: Mapping[str, Any], base: str, settings: Mapping[str, Any] | None = None
) -> Restored:
    """Build the model of a checkpoint; shapes are checked before weights of the base are read.

    Args:
        checkpoint: content of a single-file checkpoint.
        base: folder or hub id of the dense model.
        settings: configuration of the run: `model.trust_remote_code`, `lora.config`.

    Returns:
        The model, nothing masked, no adapters.

    Raises:
        StructureError: if the structure belongs to another base.
        CheckpointError: if the weights do not fit.
        ConfigError: if adapters cannot be merged without their configuration.
    """
    settings = settings or {}
    remote = bool((settings.get("model") or {}).get("trust_remote_code", False))
    empty = skeleton(config_of(base, trust_remote_code=remote), trust_remote_code=remote)
    tensors = language_model(checkpoint["state_dict"], empty)
    parts = checkpoint.get(KEY) or {}
    lora = _lora(tensors, settings, (parts.get("lora") or {}).get("config"))
    state = parts.get("prune") or {}
    _cut_and_adapt(empty, state, lora)
    _require_fit(empty, tensors, pruned="committed" in state)
    embedding = next(iter(tensors.values()))
    model: Any = load_hf(base, dtype=embedding.dtype, trust_remote_code=remote)
    progressive, injected = _cut_and_adapt(model, state, lora)
    model.load_state_dict(tensors, strict=False)  # names and shapes were compared
    if injected is not None:
        merge(injected)
    if progressive.pending:
        applied = commit(model, progressive.spec, {})
        progressive.committed(applied)
    spec = describe(model) if not state else progressive.spec
    return Restored(
        model=model, spec=spec, structure=structure_of(spec, progressive.dense), base=base
    )


def language_model(state: Mapping[str, Tensor], empty: nn.Module) -> dict[str, Tensor]:
    """The tensors of the language model under its own names, wherever it hangs in the module.

    Args:
        state: `state_dict` of a checkpoint.
        empty: the dense model, on the meta device.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: if it is not there, or more than once.
    """
    embed = f"{family_of(empty).embed}.weight"
    found = [name for name in state if name == embed or name.endswith(f".{embed}")]
    if len(found) != 1:
        raise CheckpointError(
            "need exactly one language model in the checkpoint",
            given=f"{len(found)} tensors named *.{embed}",
            allowed="weights of the architecture of the base model",
            fix="give the base model the run started from (--base)",
        )
    prefix = found[0].removesuffix(embed)
    first = {embed: state[found[0]]}
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return first | inside


def _cut_and_adapt(
    model: nn.Module, state: Mapping[str, Any], lora: Mapping[str, Any] | None
) -> tuple[Progressive, Any]:
    progressive = Progressive(model)
    if "committed" in state:
        progressive.restore(state)
    return progressive, None if lora is None else inject(model, lora)


def _lora(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], saved: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Configuration of the adapters in a checkpoint; None without adapters."""
    if not any(is_adapter_parameter(name) for name in tensors):
        return None
    given = settings.get("lora")
    if saved is not None:
        if isinstance(given, dict):
            asked = given.get("init_args", given).get("config") or {}
            require_same_adapters({k: v for k, v in asked.items() if k in saved}, saved)
        return dict(saved)
    if not isinstance(given, dict):
        raise ConfigError(
            "the checkpoint holds LoRA adapters whose scale is not known",
            given="no `lora` in the configuration",
            fix="give --config with the configuration of the run",
        )
    return dict(given.get("init_args", given).get("config") or {})


def _require_fit(empty: nn.Module, tensors: Mapping[str, Tensor], *, pruned: bool) -> None:
    """Compare names and shapes with those of the rebuilt model."""
    asked = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if asked == given:
        return
    name = next(n for n in (*asked, *given) if asked.get(n) != given.get(n))
    hint = "the structure in the checkpoint is damaged: take the checkpoint before it"
    if not pruned:
        hint = "there is no pruning structure in the checkpoint: only plprune's own can be exported"
    raise CheckpointError(
        "the weights do not fit the base model",
        given=f"{name} {given.get(name, 'missing')}",
        allowed=str(asked.get(name, "no such tensor")),
        fix=f"give the base model the run started from (--base); {hint}",
    )
