"""FSDP2 over all processes there are, whatever their number."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FullyShard(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, whose sizes need not be stated."""

    strategy_name = "fsdp2"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        **settings: Any,
    ) -> None:
        """Set up.

        Args:
            data_parallel_size: processes that share a model; default all.
            tensor_parallel_size: cuts and tensor parallelism do not go together.
            settings: of Lightning's strategy.
        """
        super().__init__(data_parallel_size, tensor_parallel_size, **settings)

    def setup_environment(self) -> None:
        """Count the processes."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def register() -> None:
    """Make `fsdp2` a name for `Trainer(strategy=...)`."""
    if FullyShard.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(
            FullyShard.strategy_name, FullyShard, description="FSDP2 over all processes"
        )


register()
