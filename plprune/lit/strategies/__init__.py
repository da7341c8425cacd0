"""One adapter per Lightning strategy."""

from __future__ import annotations

from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from plprune.errors import ConfigError
from plprune.lit.strategies.base import Adapter
from plprune.lit.strategies.fsdp2 import FSDP2
from plprune.lit.strategies.plain import DDP, SingleDevice


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
    if type(strategy) is ModelParallelStrategy:
        return FSDP2()
    raise ConfigError(
        "this strategy cannot be cut during fit",
        given=type(strategy).__name__,
        allowed="auto (one device), ddp, ModelParallelStrategy (FSDP2)",
        fix="set trainer.strategy; FSDP1 and FSDP2 do the same, see configs/strategies/fsdp2.yaml",
    )
