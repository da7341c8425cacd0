"""What of a trainer is refused before anything is set up, each in one message."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)

from plprune.errors import ConfigError

NAMES = ("auto", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
"""Strategies a run can have."""
_CHILDREN = ("ddp_spawn", "ddp_fork", "ddp_notebook")
"""How names of DDP begin that starts its processes as children of the script's own."""


def require_known(strategy: Any) -> None:
    """Refuse strategies that cannot be cut, by name or by class.

    Args:
        strategy: of the trainer, as it was given.

    Raises:
        ConfigError: with the one to take instead.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    # `ZeRO` is a DeepSpeedStrategy too: exact types.
    if name.startswith("deepspeed") or type(strategy) is DeepSpeedStrategy:
        raise ConfigError(
            "Lightning's DeepSpeed strategy cannot be cut during fit",
            given=f"trainer.strategy: {name}",
            allowed="zero1, zero2, zero3, which do the same on every device",
            fix="--config configs/strategies/zero3.yaml",
        )
    if (name.startswith("fsdp") and name != "fsdp2") or type(strategy) is FSDPStrategy:
        raise ConfigError(
            "FSDP1 cannot be cut during fit",
            given=f"trainer.strategy: {name}",
            allowed="FSDP2, which does the same",
            fix="--config configs/strategies/fsdp2.yaml",
        )
    starts = getattr(strategy, "_start_method", "") if isinstance(strategy, DDPStrategy) else ""
    if name.startswith(_CHILDREN) or starts not in ("", "popen"):
        raise ConfigError(
            "a model cut in a child process cannot come back",
            given=f"trainer.strategy: {name}" + (f" with start_method {starts}" if starts else ""),
            allowed="ddp, torchrun, or srun",
            fix="--config configs/strategies/ddp.yaml",
        )


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
