"""The plain model of a checkpoint, to be written without ever being in memory as a whole.

The base model is built without weights, cut to the structure and given adapters; that says how each
tensor of the result comes out of the checkpoint: read, merged with its adapters, masked units cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from plprune.describe import describe
from plprune.drivers.progressive import Progressive
from plprune.errors import CheckpointError, ConfigError
from plprune.lit.saved import SavedState
from plprune.lora import inject, merge, merged
from plprune.lora_config import require_same_adapters
from plprune.skeleton import config_of, skeleton
from plprune.spec import Spec
from plprune.stream import as_loaded
from plprune.surgery.apply import commit
from plprune.surgery.linear_like import is_adapter_parameter, is_lora
from plprune.surgery.rebuild import structure_of
from plprune.surgery.state import CutTable, cut, cut_table
from plprune.unwrap import family_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Restored:
    """A model taken out of a checkpoint, its weights still there."""

    model: nn.Module
    """Plain Hugging Face model on the meta device."""
    read: Callable[[str], Tensor]
    """Complete tensor by its name in the model: adapters merged, masked units cut."""
    spec: Spec
    """Its spec."""
    structure: dict[str, Any]
    """What is left of the dense model."""
    base: str
    """The dense model."""


def restore(saved: SavedState, base: str, settings: Mapping[str, Any] | None = None) -> Restored:
    """Describe the model of a checkpoint and how to read it, one tensor at a time.

    Args:
        saved: checkpoint of any strategy.
        base: folder or hub id of the dense model; only its config is read.
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
    config = config_of(base, trust_remote_code=remote)
    prefix = language_model(saved.shapes, skeleton(config, trust_remote_code=remote))
    shapes = {n.removeprefix(prefix): s for n, s in saved.shapes.items() if n.startswith(prefix)}
    dtype = saved.read(prefix + next(iter(shapes)), None, 0, 1).dtype
    model: Any = skeleton(config, dtype=dtype, trust_remote_code=remote)
    lora = _lora(shapes, settings, (saved.parts.get("lora") or {}).get("config"))
    state = saved.parts.get("prune") or {}
    zeros = bool((saved.parts.get("lora") or {}).get("zeros"))
    progressive, injected = _cut_and_adapt(model, state, lora, zeros=zeros)
    _require_fit(model, shapes, pruned="committed" in state)
    layers = {name: deepcopy(m) for name, m in model.named_modules() if is_lora(m)}
    if injected is not None:
        merge(injected)
    table = cut_table(model, progressive.lowered)
    if progressive.pending:
        progressive.committed(commit(model, progressive.spec, {}))
    spec = describe(model) if not state else progressive.spec
    as_loaded(model, base)
    return Restored(
        model=model,
        read=partial(_read, saved, prefix, layers, table),
        spec=spec,
        structure=structure_of(spec, progressive.dense),
        base=base,
    )


def _read(
    saved: SavedState, prefix: str, layers: Mapping[str, nn.Module], table: CutTable, name: str
) -> Tensor:
    path, _, leaf = name.rpartition(".")
    if path in layers:
        own = merged(layers[path], lambda part: saved.tensor(f"{prefix}{path}.{part}"))
        full = own.get_parameter(leaf).detach()
    else:
        full = saved.tensor(prefix + name)
    return cut(full, table.get(name, ()))


def language_model(names: Iterable[str], empty: nn.Module) -> str:
    """Where the language model hangs in a checkpoint.

    Args:
        names: of its weights.
        empty: the dense model, on the meta device.

    Returns:
        Prefix of its tensors, empty or with a dot at the end.

    Raises:
        CheckpointError: if it is not there, or more than once.
    """
    embed = f"{family_of(empty).embed}.weight"
    found = [name for name in names if name == embed or name.endswith(f".{embed}")]
    if len(found) != 1:
        raise CheckpointError(
            "need exactly one language model in the checkpoint",
            given=f"{len(found)} tensors named *.{embed}",
            allowed="weights of the architecture of the base model",
            fix="give the base model the run started from (--base)",
        )
    return found[0].removesuffix(embed)


def _cut_and_adapt(
    model: nn.Module, state: Mapping[str, Any], lora: Mapping[str, Any] | None, *, zeros: bool
) -> tuple[Progressive, Any]:
    progressive = Progressive(model)
    if "committed" in state:
        progressive.restore(state)
    # Factors are read later: a start that looks at weights has none to look at.
    plain = {**(lora or {}), "init_lora_weights": True}
    return progressive, None if lora is None else inject(model, plain, zeros=zeros)


def _lora(
    names: Iterable[str], settings: Mapping[str, Any], saved: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Configuration of the adapters in a checkpoint; None without adapters."""
    if not any(is_adapter_parameter(name) for name in names):
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


def _require_fit(empty: nn.Module, given: Mapping[str, tuple[int, ...]], *, pruned: bool) -> None:
    """Compare names and shapes with those of the rebuilt model."""
    asked = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
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
