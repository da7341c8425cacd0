"""DeepSpeed ZeRO: weights and moments out of the engine, surgery, and another engine around it.

Every trained tensor is put together once, cut, and kept by one rank (they take turns), so that no
rank holds more than its share; afterwards its keeper sends it round and each rank takes its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from plprune.dist import together
from plprune.errors import ConfigError, PlanError
from plprune.lit.saved import zero as zero_folder
from plprune.lit.saved.state import SavedState
from plprune.lit.strategies.base import Adapter
from plprune.lit.strategies.engine import teardown
from plprune.lit.strategies.filling import (
    described,
    fill_groups,
    fill_part,
    require_same_tensors,
)
from plprune.lit.strategies.zero_snapshot import put_back, take
from plprune.lit.strategies.zero_state import (
    MASTER,
    complete,
    is_stage_3,
    known,
    make_state,
    moments_of,
    put,
    put_part,
    trained,
)
from plprune.sharded import part, state_of
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied, commit, kept_entries
from plprune.surgery.removal import removable
from plprune.surgery.state import Cuts, cut_table
from plprune.unwrap import unwrap


class ZeROAdapter(Adapter):
    """Stages 1, 2 and 3."""

    gradients_in_module = False

    def optimizers(self, trainer: Trainer) -> list[torch.optim.Optimizer]:
        """The torch optimizer inside ZeRO's; its tensors are flat parts of many parameters."""
        return [zero.optimizer for zero in cast("list[Any]", trainer.strategy.optimizers)]

    def groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        """See `Adapter.groups`; what the torch optimizer holds has no names any more."""
        strategy: Any = trainer.strategy
        if not strategy.optimizers:
            return []
        groups = strategy.optimizers[0].param_groups
        return [described(g, n) for g, n in zip(groups, strategy.group_names, strict=True)]

    def fits(self, trainer: Trainer, path: Path) -> bool:
        """Folders of the same stage from as many processes; see `Adapter.fits`."""
        strategy: Any = trainer.strategy
        if not strategy.optimizers:  # DeepSpeed loads into an engine that trains, no other
            return False
        stage = strategy.config["zero_optimization"]["stage"]
        return zero_folder.is_one(path) and zero_folder.fits(path, stage, trainer.world_size)

    def fill(self, trainer: Trainer, saved: SavedState) -> None:
        """Every process reads what it keeps; see `Adapter.fill`."""
        root = trainer.lightning_module
        with together():
            require_same_tensors(root, saved)
            with torch.no_grad():
                for name, tensor in state_of(root).items():
                    fill_part(part(tensor), tensor, saved, name)
            if trainer.training:
                _fill_state(trainer.strategy, root, saved)

    def signature(self, trainer: Trainer) -> list[Any]:
        """Learning rates; how many flat tensors there are depends on sizes."""
        return [
            [group["lr"] for group in optimizer.param_groups]
            for optimizer in trainer.strategy.optimizers
        ]

    def assert_consistent(self, trainer: Trainer) -> None:
        """Every trainable parameter, with its present shape, is known to the engine."""
        there = known(trainer.strategy.optimizers[0])
        wrong = [name for name, p in trained(trainer.lightning_module) if p not in there]
        if wrong:
            raise PlanError(
                "the engine does not know the parameters it should train",
                given=f"{len(wrong)} unknown ({', '.join(wrong[:3])})",
                allowed="every trainable parameter",
            )

    def prepare(self, trainer: Trainer) -> None:
        """Refuse clipping that is stated twice."""
        stated = cast(Any, trainer.strategy).config.get("gradient_clipping")
        asked = trainer.gradient_clip_val
        if stated is not None and asked is not None and float(stated) != float(asked):
            raise ConfigError(
                "gradient clipping is stated twice",
                given=f"{stated} in the DeepSpeed config, {asked} in the trainer",
                fix="leave it out of the DeepSpeed config",
            )

    def recut(
        self, trainer: Trainer, model: nn.Module, spec: Spec, lowered: Lowered, *, reset: bool
    ) -> Applied:
        """Commit a cut; see `Adapter.recut`."""
        root = trainer.lightning_module
        prefix = _prefix(root, unwrap(model))
        keep = kept_entries(spec, lowered)
        table = cut_table(unwrap(model), keep)
        cuts = {prefix + name: value for name, value in table.items()}
        removed = removable(unwrap(model), spec, spec.cut(keep, physical=True))
        gone, done = {prefix + name for name in removed}, list[Applied]()
        strategy: Any = trainer.strategy
        if strategy.optimizers:
            strategy.group_names = _without(strategy.group_names, gone)

        def change() -> None:
            applied = commit(model, spec, lowered)
            for swap in applied.swaps:  # or they would keep the flat buffer of all weights
                held = part(swap.old)
                held.data = held.data.new_empty(0)
            for parameter in applied.gone.values():
                part(parameter).data = part(parameter).data.new_empty(0)
            done.append(applied)

        if trainer.strategy.optimizers:
            rebuild(trainer, change, cuts, reset=reset)
        else:  # a checkpoint is loaded to be measured
            _without_optimizer(trainer.strategy, root, change, cuts)
        return done[0]

    def write(self, trainer: Trainer, parameter: nn.Parameter, full: Tensor) -> None:
        """Masters as well: the next step would bring their values back."""
        optimizers: Any = trainer.strategy.optimizers
        if optimizers and parameter in known(optimizers[0]):
            put(parameter, MASTER, full.to(trainer.strategy.root_device, torch.float32))
        super().write(trainer, parameter, full)

    def mask_state(self, trainer: Trainer, parameter: nn.Parameter, keep: Tensor) -> None:
        """Moments are flat parts of many parameters; see `Adapter.mask_state`."""
        optimizers: Any = trainer.strategy.optimizers
        if not optimizers or parameter not in known(optimizers[0]):
            return
        for key in moments_of(optimizers[0]):
            full = complete(parameter, key)
            put(parameter, key, full * keep.to(full.device, full.dtype).reshape(full.shape))

    def finish(self, trainer: Trainer) -> None:
        """Build an engine without optimizer: masters of a merged model would be all of it again."""
        _without_optimizer(trainer.strategy, trainer.lightning_module, lambda: None, {})

    def refit(self, trainer: Trainer) -> None:
        """Build an engine over what is trainable now; state of what stays trainable is kept."""
        if trainer.strategy.optimizers:
            rebuild(trainer, lambda: None, {}, anew=True)


def rebuild(
    trainer: Trainer,
    change: Callable[[], object],
    cuts: Mapping[str, Cuts],
    *,
    reset: bool = False,
    anew: bool = False,
) -> None:
    """Take the engine off, change the module, put another engine on.

    Args:
        trainer: running under `ZeRO`, at an optimizer-step boundary.
        change: replaces parameters of the module.
        cuts: what that does to them, by name in the LightningModule.
        reset: drop the optimizer's state; masters are kept in any case.
        anew: ask the module for another optimizer, over what is trainable now.
    """
    strategy: Any = trainer.strategy
    root = trainer.lightning_module
    saved = take(strategy, root, cuts, reset=reset)
    optimizer = strategy.model.optimizer.optimizer
    positions = [config.scheduler.state_dict() for config in strategy.lr_scheduler_configs]
    rates = [group["lr"] for group in optimizer.param_groups]
    with strategy.reusing(optimizer) if not anew else contextlib.nullcontext():
        teardown(strategy, root)
        _leave_flat_buffers(root, cuts)
        change()
        if not anew:
            _own_again(optimizer, root, strategy.group_names)
        strategy._initialize_deepspeed_train(root)
    if anew:
        for config, position in zip(strategy.lr_scheduler_configs, positions, strict=True):
            config.scheduler.load_state_dict(position)
        groups = strategy.optimizers[0].param_groups
        for group, rate in zip(groups, rates, strict=False):
            group["lr"] = rate
    put_back(strategy, root, saved)


def _without_optimizer(
    strategy: Any, root: nn.Module, change: Callable[[], object], cuts: Mapping[str, Cuts]
) -> None:
    teardown(strategy, root)
    _leave_flat_buffers(root, cuts)
    change()
    strategy._initialize_deepspeed_inference(root)


def _fill_state(strategy: Any, root: nn.Module, saved: SavedState) -> None:
    engine, zero = strategy.model, strategy.model.optimizer
    engine.global_steps = int(saved.rest.get("global_step", 0))
    fill_groups(zero.param_groups, saved)
    named = list(trained(root))
    keys = saved.keys.get(named[0][0], ()) if named else ()
    if keys:
        make_state(zero, keys, saved.numbers(named[0][0]))
    for name, parameter in named:
        for key in (MASTER, *keys):
            source = None if key == MASTER else key
            if is_stage_3(zero):
                mine = torch.empty_like(part(parameter), dtype=torch.float32)
                fill_part(mine, parameter, saved, name, source)
                put_part(parameter, key, mine)
            else:
                full = saved.tensor(name, source).to(strategy.root_device, torch.float32)
                put(parameter, key, full)


def _without(groups: list[list[str]], gone: set[str]) -> list[list[str]]:
    """Optimizer groups without removed parameters."""
    left = [[name for name in names if name not in gone] for names in groups]
    empty = [names for names, rest in zip(groups, left, strict=True) if not rest]
    if empty:
        raise PlanError(
            "an optimizer group would lose its last tensor, and DeepSpeed drops the group",
            given=f"a group of {len(empty[0])} tensors, all of removed blocks ({empty[0][0]}, ...)",
            allowed="groups that span blocks",
            fix="let configure_optimizers make groups by kind of tensor, or use ddp or fsdp2",
        )
    return left


def _own_again(optimizer: Any, root: nn.Module, names: list[list[str]]) -> None:
    """Put the module's parameters back into a torch optimizer whose tensors ZeRO had replaced."""
    named = dict(root.named_parameters())
    optimizer.state.clear()
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [named[name] for name in members]


def _leave_flat_buffers(root: nn.Module, cuts: Mapping[str, Cuts]) -> None:
    """Parameters, or a rank's parts of them, are views of buffers that must go with the engine.

    Those that will be cut get tensors of their own then.
    """
    for name, parameter in root.named_parameters():
        if name not in cuts:
            held = part(parameter)
            held.data = held.data.clone()


def _prefix(root: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in root.named_modules() if module is model)
    return f"{name}." if name else ""
