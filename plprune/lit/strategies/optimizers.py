"""Optimizers after a cut: made again where parameters changed, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from plprune.errors import PlanError


def rebuild_optimizers(trainer: Trainer) -> None:
    """Make optimizers and schedulers again after the set of trainable parameters changed.

    State of parameters that stay trainable is kept, and so are learning rates (of optimizers with
    as many groups as before) and scheduler positions.

    Args:
        trainer: running on one device.
    """
    strategy = trainer.strategy
    kept = {p: state for optimizer in strategy.optimizers for p, state in optimizer.state.items()}
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in strategy.optimizers]
    positions = [config.scheduler.state_dict() for config in strategy.lr_scheduler_configs]
    strategy.setup_optimizers(trainer)
    for optimizer in strategy.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in kept:
                    optimizer.state[parameter] = kept[parameter]
    for config, position in zip(strategy.lr_scheduler_configs, positions, strict=True):
        config.scheduler.load_state_dict(position)
        _set_rates(config.scheduler.optimizer, config.scheduler.get_last_lr())
    for optimizer, before in zip(strategy.optimizers, rates, strict=True):
        if len(before) == len(optimizer.param_groups):
            _set_rates(optimizer, before)


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float | Tensor]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def assert_consistent(module: nn.Module, optimizers: list[Any]) -> None:
    """Every trainable parameter, and nothing else, is in one group, with state of its own shape.

    Args:
        module: what the trainer trains.
        optimizers: the trainer's.

    Raises:
        PlanError: otherwise; training would silently go on without those weights.
    """
    owned: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owned[id(parameter)] = owned.get(id(parameter), 0) + 1
    wrong = [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and owned.pop(id(p), 0) != 1
    ]
    known = {id(p) for p in module.parameters()}
    held = {*owned, *(id(p) for optimizer in optimizers for p in optimizer.state)}
    stale = held - known
    crooked = [
        key
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape
    ]
    if wrong or stale or crooked:
        raise PlanError(
            "the optimizer does not match the model",
            given=f"{len(wrong)} trainable parameters not in exactly one group "
            f"({', '.join(wrong[:3])}), "
            f"{len(stale)} stale parameters, {len(crooked)} states of another shape",
            allowed="every trainable parameter once",
            fix="let configure_optimizers pass each trainable parameter to exactly one group",
        )
