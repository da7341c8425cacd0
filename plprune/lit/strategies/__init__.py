"""One adapter per Lightning strategy."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from plprune.errors import ConfigError
from plprune.lit.strategies.base import Adapter
from plprune.lit.strategies.deepspeed import ZeRO
from plprune.lit.strategies.fsdp2 import FSDP2
from plprune.lit.strategies.fully_shard import FullyShard
from plprune.lit.strategies.plain import DDP, SingleDevice
from plprune.lit.strategies.zero import ZeROAdapter


def groups_of(trainer: Trainer) -> list[dict[str, Any]]:
    """What a checkpoint says about the optimizer; see `Adapter.groups`.

    Args:
        trainer: with its optimizers.

    Returns:
        Groups; empty for a strategy without adapter.
    """
    try:
        adapter = adapter_for(trainer.strategy)
    except ConfigError:
        return []
    return adapter.groups(trainer)


def adapter_for(strategy: Strategy) -> Adapter:
    """The adapter of a strategy.

    Args:
        strategy: the trainer's.

    Returns:
        Its adapter.

    Raises:
        ConfigError: if the strategy cannot be cut during `fit`.
    """
    # Exact types: what a subclass changes is unknown here.
    if (
        type(strategy) is SingleDeviceStrategy
        or type(strategy).__name__ == "SingleDeviceXLAStrategy"
    ):
        return SingleDevice()
    if type(strategy) is DDPStrategy:
        return DDP()
    if type(strategy) in (ModelParallelStrategy, FullyShard):
        return FSDP2()
    if isinstance(strategy, ZeRO):
        return ZeROAdapter()
    raise ConfigError(
        "this strategy cannot be cut during fit",
        given=type(strategy).__name__,
        allowed="auto (one device), ddp, fsdp2, zero1, zero2, zero3",
        fix="take fsdp2 instead of FSDP1, and zero3 (plprune.lit.strategies.deepspeed.ZeRO) "
        "instead of Lightning's DeepSpeed: see configs/strategies",
    )
