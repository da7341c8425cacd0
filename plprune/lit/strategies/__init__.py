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
from plprune.lit.strategies.usable import NAMES, require_known
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


def divides(strategy: Strategy) -> bool:
    """Whether a strategy divides weights, now or later.

    Args:
        strategy: the trainer's.
    """
    if isinstance(strategy, ZeRO):
        config: Any = strategy.config or {}
        return bool(config.get("zero_optimization", {}).get("stage") == 3)
    return isinstance(strategy, ModelParallelStrategy)


def adapter_for(strategy: Strategy) -> Adapter:
    """The adapter of a strategy.

    Args:
        strategy: the trainer's.

    Returns:
        Its adapter.

    Raises:
        ConfigError: if the strategy cannot be cut during `fit`.
    """
    require_known(strategy)
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
        allowed=", ".join(NAMES),
        fix="see configs/strategies",
    )
