"""Keep what is zero at zero while everything else is trained."""

from __future__ import annotations

import logging
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from plprune.callbacks.statistics import Statistics
from plprune.errors import ConfigError
from plprune.lit import blockwise, guard
from plprune.lit.kept_zeros import KeptZeros, share_of_zeros
from plprune.unwrap import find_model

log = logging.getLogger(__name__)


@final
class KeepMasks(Callback):
    """Train a model with zeros in its linears without filling them.

    The zeros of the linears in the blocks at the start of the run, and those that later cuts make,
    get no gradient; norms, embeddings, biases and adapters are trained as ever. `Prune` brings this
    callback along for methods that set single weights to zero.
    """

    def __init__(self, attribute: str | None = None) -> None:
        """Set up.

        Args:
            attribute: where the language model hangs in the module; default the only one in it.
        """
        self.attribute = attribute
        self._kept: KeptZeros | None = None
        self._due = False
        self._at = (0, 0)  # optimizer steps and cuts of the last look

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the zeros that are there.

        Raises:
            ConfigError: if there are none, and nobody will make some.
        """
        self._kept = KeptZeros(trainer, find_model(pl_module, self.attribute))
        found = sum(self._kept.counts.values())
        if not found and guard.pruner_of(trainer) is None:
            raise ConfigError(
                "there are no zeros to keep",
                given="a model whose linears have none",
                allowed="a model that was pruned to zeros, or a Prune callback that does it",
                fix="leave KeepMasks out, or load the output of `plprune prune`",
            )
        share = share_of_zeros(self._kept.model, self._kept.counts)
        if found:
            log.info("keeping %d zeros, %.3f %% of the linears in the blocks", found, 100 * share)
        self._due, self._at = True, _position(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clear gradients before they are clipped and used."""
        if self._kept is not None:
            self._kept.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first step, and the first after every cut, see that zeros stay."""
        kept, at = self._kept, _position(trainer)
        if kept is None or at == self._at:
            return
        if at[1] != self._at[1] or kept.changed():
            kept.look(trainer)
            self._due = True
        elif self._due:
            kept.require_kept(trainer)
            self._due = False
        self._at = at

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that every zero stayed."""
        if self._kept is not None and not self._kept.changed():
            self._kept.require_kept(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self._kept is not None:
            self._kept.remove()
            self._kept = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same after an error, when Lightning calls no `teardown`."""
        self.teardown(trainer, pl_module, "fit")


def bring_along(trainer: Trainer, attribute: str | None, statistics: Statistics) -> None:
    """Add a `KeepMasks` to a run that has none, for a method that goes block by block.

    Args:
        trainer: being set up; callbacks that come later are set up too.
        attribute: where the language model hangs.
        statistics: of the run.

    Raises:
        ConfigError: if the method cannot look at that.
    """
    blockwise.require_possible(statistics.source)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, KeepMasks) for callback in callbacks):
        callbacks.append(KeepMasks(attribute))


def _position(trainer: Trainer) -> tuple[int, int]:
    """Optimizer steps and cuts so far."""
    progressive = getattr(guard.pruner_of(trainer), "progressive", None)
    return trainer.global_step, 0 if progressive is None else progressive.done
