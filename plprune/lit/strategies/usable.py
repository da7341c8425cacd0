"""What of a trainer is refused before anything is set up, each in one message."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pydoc import locate
from typing import Any

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)

from plprune.errors import ConfigError

NAMES = ("auto", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
"""Strategies a run can have."""
_CHILDREN = ("ddp_spawn", "ddp_fork", "ddp_notebook")
"""How names of DDP begin that starts its processes as children of the script's own."""


def require_settings(trainer: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer on which Lightning itself would stumble.

    Args:
        trainer: its arguments by name.

    Raises:
        ConfigError: naming the setting.
    """
    batches, strategy = trainer.get("accumulate_grad_batches", 1), trainer.get("strategy")
    for name in ("max_steps", "max_epochs"):
        value = trainer.get(name)
        if isinstance(value, int) and value < -1:
            raise ConfigError(
                f"trainer.{name} out of range", given=str(value), allowed="0 or more, or -1: no end"
            )
    if batches < 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches out of range", given=str(batches), allowed="1 or more"
        )
    require_known(strategy)
    if isinstance(strategy, str) and strategy.lower() not in (*NAMES, *StrategyRegistry):
        near = difflib.get_close_matches(strategy.lower(), NAMES, n=1)
        raise ConfigError(
            "unknown trainer.strategy",
            given=strategy,
            allowed=", ".join(NAMES) + ", or a class_path",
            fix=(f"did you mean {near[0]}? " if near else "") + "see configs/strategies",
        )


def require_known(strategy: Any) -> None:
    """Refuse strategies that cannot be cut, by name or by class.

    Args:
        strategy: of the trainer, as it was given: a name, an object, or class_path and init_args.

    Raises:
        ConfigError: with the one to take instead.
    """
    name, kind, starts = _named(strategy)
    # `ZeRO` is a DeepSpeedStrategy too: exact types.
    if name.startswith("deepspeed") or kind is DeepSpeedStrategy:
        raise ConfigError(
            "Lightning's DeepSpeed strategy cannot be cut during fit",
            given=f"trainer.strategy: {name}",
            allowed="zero1, zero2, zero3, which do the same on every device",
            fix="--config configs/strategies/zero3.yaml",
        )
    if (name.startswith("fsdp") and name != "fsdp2") or kind is FSDPStrategy:
        raise ConfigError(
            "FSDP1 cannot be cut during fit",
            given=f"trainer.strategy: {name}",
            allowed="FSDP2, which does the same",
            fix="--config configs/strategies/fsdp2.yaml",
        )
    if name.startswith(_CHILDREN) or starts not in ("", "popen"):
        raise ConfigError(
            "a model cut in a child process cannot come back",
            given=f"trainer.strategy: {name}" + (f" with start_method {starts}" if starts else ""),
            allowed="ddp, torchrun, or srun",
            fix="--config configs/strategies/ddp.yaml",
        )


def _named(strategy: Any) -> tuple[str, type | None, str]:
    """Name, class, and for DDP how processes are started."""
    if isinstance(strategy, str):
        return strategy, None, ""
    told = not isinstance(strategy, Strategy)
    kind: Any = locate(strategy["class_path"]) if told else type(strategy)
    settings = (strategy.get("init_args") or {}) if told else vars(strategy)
    starts = settings.get("start_method" if told else "_start_method", "")
    return kind.__name__, kind, starts if issubclass(kind, DDPStrategy) else ""


def require_started(trainer: Trainer) -> None:
    """Refuse a number of processes that is not the trainer's, as torchrun started them.

    Processes that do not know of each other would each train the whole run into the same folders.

    Args:
        trainer: before anything is set up.

    Raises:
        ConfigError: with both numbers.
    """
    if not TorchElasticEnvironment.detect():
        return
    started = int(os.environ.get("WORLD_SIZE", "1"))
    asked = trainer.num_devices * trainer.num_nodes
    if started != asked:
        raise ConfigError(
            "the number of processes is not that of the trainer",
            given=f"{started} processes were started, trainer.devices {trainer.num_devices} x "
            f"trainer.num_nodes {trainer.num_nodes} = {asked}",
            allowed="the same number",
            fix=f"set trainer.devices to processes a node (with a strategy such as ddp), or start "
            f"{asked}",
        )


def require_one_dimension(strategy: Any) -> None:
    """Refuse tensor parallelism.

    Args:
        strategy: of the trainer.

    Raises:
        ConfigError: for more than one device along it.
    """
    size = getattr(strategy, "_tensor_parallel_size", 1)
    if isinstance(strategy, ModelParallelStrategy) and size not in (1, "auto"):
        raise ConfigError(
            "tensor parallelism cannot be cut during fit",
            given=f"tensor_parallel_size {size}",
            allowed="1",
            fix="set tensor_parallel_size: 1 and data_parallel_size to the number of devices",
        )


def require_engine(config: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed config that says what the trainer and the module say, or nothing of ZeRO.

    Args:
        config: as DeepSpeed takes it.

    Raises:
        ConfigError: naming the key.
    """
    zero = config.get("zero_optimization")
    found = zero.get("stage") if isinstance(zero, Mapping) else None
    if found not in (1, 2, 3) or isinstance(found, bool):
        raise ConfigError(
            "the DeepSpeed config names no ZeRO stage that can be cut",
            given=f"zero_optimization.stage: {found}, keys {', '.join(config) or 'none'}",
            allowed="1, 2 or 3",
            fix='set {"zero_optimization": {"stage": 3}} and check the spelling of the keys',
        )
    owners = {
        "optimizer": "model.optimizer, or configure_optimizers of your module",
        "scheduler": "model.learning_rate, or configure_optimizers of your module",
        "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    }
    for key, owner in owners.items():
        if key in config:
            raise ConfigError(
                f"{key} does not belong in the DeepSpeed config",
                given=f"{key}: {config[key]}",
                allowed=f"{owner}: cuts follow those",
                fix="leave it out of the DeepSpeed config",
            )
    halves = [key for key in ("fp16", "bf16") if dict(config.get(key) or {}).get("enabled") is True]
    if len(halves) > 1:
        raise ConfigError(
            "two number formats in the DeepSpeed config",
            given="fp16 and bf16 enabled",
            allowed="one of them",
            fix="leave both out and set trainer.precision",
        )


def require_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that DeepSpeed replaces by one of its own.

    Args:
        optimizer: of the module.

    Raises:
        ConfigError: naming it.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ConfigError(
            "DeepSpeed trains otherwise than this optimizer says",
            given=f"{type(optimizer).__name__}: it makes another one, without schedules and groups",
            allowed="AdamW, Adam, NAdam, SGD and others that keep no state before the first step",
            fix="choose another optimizer, or strategy: fsdp2",
        )
