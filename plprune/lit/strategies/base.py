"""What every strategy must be able to do for a cut; `recut` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from plprune import sharded
from plprune.lit.saved.state import SavedState
from plprune.lit.strategies.filling import described
from plprune.lit.strategies.optimizers import assert_consistent, rebuild_optimizers
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied, commit
from plprune.surgery.state import slice_optimizer


class Adapter(ABC):
    """How one strategy lets a model change its shapes between two optimizer steps."""

    gradients_in_module = True
    """Whether gradients are in `parameter.grad` when the optimizer steps."""

    def prepare(self, trainer: Trainer) -> None:
        """Refuse settings of the strategy that no cut survives, and mend what would spoil a run.

        Args:
            trainer: with its strategy set up.

        Raises:
            ConfigError: naming the setting.
        """
        del trainer

    def verify(self, trainer: Trainer) -> None:
        """Refuse a model that the strategy would not train as its name says.

        Args:
            trainer: with the model set up.

        Raises:
            ConfigError: saying what is missing.
        """
        del trainer

    def optimizers(self, trainer: Trainer) -> list[torch.optim.Optimizer]:
        """The torch optimizers that hold the state.

        Args:
            trainer: with its optimizers.

        Returns:
            Optimizers without the strategy's wrappers.
        """
        return list(trainer.strategy.optimizers)

    def groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        """What a checkpoint must say about the optimizer to be loaded by another strategy.

        Args:
            trainer: with its optimizers.

        Returns:
            For every group the names of its parameters in the LightningModule, and its
            hyperparameters; empty without exactly one optimizer, and when that holds parameters
            that are gone, as after adapters were merged.
        """
        optimizers = self.optimizers(trainer)
        if len(optimizers) != 1:
            return []
        names = {p: name for name, p in trainer.lightning_module.named_parameters()}
        if any(p not in names for group in optimizers[0].param_groups for p in group["params"]):
            return []
        return [
            described(group, [names[p] for p in group["params"]])
            for group in optimizers[0].param_groups
        ]

    def fits(self, trainer: Trainer, path: Path) -> bool:
        """Whether the strategy can load a checkpoint itself, with optimizer state.

        Args:
            trainer: with its strategy set up.
            path: file or folder.
        """
        del trainer
        return path.is_file()

    def fill(self, trainer: Trainer, saved: SavedState) -> None:
        """Take weights and optimizer state from a checkpoint that another strategy wrote.

        Args:
            trainer: with optimizers if it fits; the model has the structure of the checkpoint.
            saved: the checkpoint.

        Raises:
            CheckpointError: if it does not belong to this model.
        """
        raise NotImplementedError("for strategies that load a checkpoint after their set-up")

    def signature(self, trainer: Trainer) -> list[Any]:
        """What a cut must not change in the optimizers.

        Args:
            trainer: with its optimizers.

        Returns:
            Comparable values: learning rate and number of tensors of every group.
        """
        return [
            [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
            for optimizer in trainer.strategy.optimizers
        ]

    def assert_consistent(self, trainer: Trainer) -> None:
        """Check that what the model has is what is trained.

        Args:
            trainer: after a change.

        Raises:
            PlanError: otherwise; training would silently go on without some weights.
        """
        assert_consistent(trainer.lightning_module, self.optimizers(trainer))

    @abstractmethod
    def recut(
        self, trainer: Trainer, model: nn.Module, spec: Spec, lowered: Lowered, *, reset: bool
    ) -> Applied:
        """Commit a cut in place; collective on all ranks.

        Args:
            trainer: running, at an optimizer-step boundary.
            model: the language model as it hangs in the LightningModule.
            spec: its spec; entries listed as dead are dropped too.
            lowered: kept entries.
            reset: drop optimizer state instead of cutting it.

        Returns:
            Spec after the cut and the replaced parameters.
        """

    def write(self, trainer: Trainer, parameter: nn.Parameter, full: Tensor) -> None:
        """Give a parameter new values in every copy that training has of it.

        Args:
            trainer: running, after `rest`.
            parameter: of the module, trained or not.
            full: complete values, equal on all ranks.
        """
        del trainer
        sharded.write(parameter, full)

    def mask_state(self, trainer: Trainer, parameter: nn.Parameter, keep: Tensor) -> None:
        """Clear what the optimizer remembers of entries that were set to zero.

        Args:
            trainer: running, after `rest`.
            parameter: of the module, trained or not.
            keep: bool, of the complete parameter's shape as the linear has it, True for what stays.
        """
        for optimizer in self.optimizers(trainer):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    stays = keep.to(value.device, value.dtype).reshape(value.shape)
                    value.mul_(sharded.shard_like(stays, value))

    def rest(self, trainer: Trainer) -> None:
        """Bring the parameters that training owns back into the modules, before these change.

        Args:
            trainer: set up or running.
        """
        del trainer

    def rewrap(self, trainer: Trainer) -> None:
        """Let the wrapper take over a model that got or lost parameters; collective on all ranks.

        Args:
            trainer: set up or running.
        """
        del trainer

    def finish(self, trainer: Trainer) -> None:
        """Let the wrapper take over a model whose training is over, to be measured and written.

        Args:
            trainer: at the end of training.
        """
        self.rewrap(trainer)

    def refit(self, trainer: Trainer) -> None:
        """The same, and let the optimizers follow, if they exist already.

        Args:
            trainer: set up or running.
        """
        self.rewrap(trainer)
        if trainer.strategy.optimizers:
            rebuild_optimizers(trainer)


def cut_in_place(
    optimizers: list[torch.optim.Optimizer],
    model: nn.Module,
    spec: Spec,
    lowered: Lowered,
    *,
    reset: bool,
) -> Applied:
    """Swap parameters and cut the state of the same optimizer objects.

    Learning rates and schedules go on: they refer to the optimizers' groups.

    Args:
        optimizers: of the model's parameters.
        model: without wrapper.
        spec: its spec.
        lowered: kept entries.
        reset: drop optimizer state instead of cutting it.

    Returns:
        Spec after the cut and the replaced parameters.
    """
    for parameter in model.parameters():
        parameter.grad = None  # used up; the next step would drop it, after old and new had met
    applied = commit(model, spec, lowered)
    for optimizer in optimizers:
        slice_optimizer(optimizer, applied.swaps, gone=applied.gone.values(), reset=reset)
    torch.compiler.reset()
    return applied
