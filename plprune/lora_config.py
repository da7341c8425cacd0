"""Settings of LoRA adapters, checked before any are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from plprune.errors import CheckpointError, ConfigError
from plprune.sharded import any_sharded
from plprune.surgery.linear_like import base_of
from plprune.unwrap import family_of, unwrap


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


def require_pairs(settings: Mapping[str, Any]) -> None:
    """Refuse what peft trains beside its pairs of factors: nothing cuts, saves or merges it.

    Args:
        settings: arguments of `peft.LoraConfig`.

    Raises:
        ConfigError: naming the argument.
    """
    for key, only in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        if settings.get(key, only) not in (only, None):
            raise ConfigError(
                "these adapters are not trained here",
                given=f"lora.config.{key}: {settings[key]}",
                allowed=only,
                fix=f"leave {key} out",
            )
    others = ("modules_to_save", "trainable_token_indices", "target_parameters")
    found = next((key for key in (*others, "layer_replication") if settings.get(key)), None)
    if found is not None:
        raise ConfigError(
            "these adapters cannot be cut and merged",
            given=f"lora.config.{found}: {settings[found]}",
            allowed="pairs of factors on linears, by target_modules",
            fix=f"leave {found} out; to train whole modules, leave `lora` out",
        )


def require_whole(model: nn.Module, settings: Mapping[str, Any], *, divided: bool = False) -> None:
    """Refuse adapters that read the weights they are put on, where no process has them whole.

    Args:
        model: plain.
        settings: arguments of `peft.LoraConfig`.
        divided: whether its weights will be divided later.

    Raises:
        ConfigError: naming the settings.
    """
    reads = [f"use_dora: {settings['use_dora']}"] if settings.get("use_dora") else []
    start = settings.get("init_lora_weights", True)
    reads += [] if start in (True, False, "gaussian") else [f"init_lora_weights: {start}"]
    if reads and (divided or any_sharded(model.parameters())):
        raise ConfigError(
            "these adapters need complete weights",
            given=f"{', '.join(reads)}, and a strategy that divides the weights (zero3, fsdp2)",
            allowed="LoRA with init_lora_weights true, false or gaussian; or one device, ddp, "
            "zero1, zero2",
            fix="change lora.config or trainer.strategy",
        )


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
