"""Strategies whose every process holds whole tensors: one device, and DDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plprune.errors import ConfigError
from plprune.lit.strategies.base import Adapter, cut_in_place
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied


class SingleDevice(Adapter):
    """One process: swap parameters and cut the state of the same optimizer object."""

    def recut(
        self, trainer: Trainer, model: nn.Module, spec: Spec, lowered: Lowered, *, reset: bool
    ) -> Applied:
        """Commit a cut; see `Adapter.recut`."""
        return cut_in_place(self.optimizers(trainer), model, spec, lowered, reset=reset)


class DDP(SingleDevice):
    """The same on every process, with the wrapper off: its reducer hangs at the old tensors."""

    def prepare(self, trainer: Trainer) -> None:
        """Refuse averaging of whole models."""
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy), "chosen by `adapter_for`"
        if getattr(strategy, "_model_averaging_period", None) is not None:
            raise ConfigError(
                "model averaging cannot run together with pruning",
                given="DDPStrategy(model_averaging_period=...)",
                allowed="DDP without it",
                fix="leave model_averaging_period out",
            )

    def recut(
        self, trainer: Trainer, model: nn.Module, spec: Spec, lowered: Lowered, *, reset: bool
    ) -> Applied:
        """Commit a cut; see `Adapter.recut`."""
        with unwrapped(trainer):
            return super().recut(trainer, model, spec, lowered, reset=reset)

    def refit(self, trainer: Trainer) -> None:
        """Wrap again: the reducer waits for gradients of exactly the parameters it was made for."""
        with unwrapped(trainer):
            super().refit(trainer)


@contextmanager
def unwrapped(trainer: Trainer) -> Iterator[None]:
    """Take the DDP wrapper off, if it is on, and make another one afterwards.

    Args:
        trainer: under `DDPStrategy`.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, DDPStrategy), "chosen by `adapter_for`"
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        # The last reference: the reducer takes its hooks off the parameters when it goes.
        strategy.model = strategy.lightning_module
    yield
    if wrapped:
        strategy.configure_ddp()
