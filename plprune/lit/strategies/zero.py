"""DeepSpeed ZeRO: weights and moments out of the engine, surgery, and another engine around it.

Every trained tensor is put together once, cut, and kept by one rank (they take turns), so that no
rank holds more than its share; afterwards its keeper sends it round and each rank takes its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from plprune.errors import ConfigError, PlanError
from plprune.lit.strategies.base import Adapter
from plprune.lit.strategies.engine import teardown
from plprune.sharded import zero_part
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied, commit, kept_entries
from plprune.surgery.state import Cuts, cut, cut_table
from plprune.unwrap import unwrap

_COUNTERS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")
_MASTER = "master"


@dataclass
class Saved:
    """What training knows beyond the working copy of the weights."""

    counters: dict[str, int]
    """Of the engine."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """State that is one number a tensor, such as the step."""
    keys: tuple[str, ...] = ()
    """Names of state tensors of the parameter's shape."""
    owner: dict[str, int] = field(default_factory=dict)
    """Parameter -> rank that keeps it."""
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(parameter, master or key) -> complete tensor, on its keeper."""
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    """Parameter -> shape after the cut."""


class ZeROAdapter(Adapter):
    """Stages 1, 2 and 3."""

    def optimizers(self, trainer: Trainer) -> list[torch.optim.Optimizer]:
        """The torch optimizer inside ZeRO's; its tensors are flat parts of many parameters."""
        return [zero.optimizer for zero in cast("list[Any]", trainer.strategy.optimizers)]

    def signature(self, trainer: Trainer) -> list[Any]:
        """Learning rates; how many flat tensors there are depends on sizes."""
        return [
            [group["lr"] for group in optimizer.param_groups]
            for optimizer in trainer.strategy.optimizers
        ]

    def assert_consistent(self, trainer: Trainer) -> None:
        """Every trainable parameter, with its present shape, is known to the engine."""
        known = _known(trainer.strategy.optimizers[0])
        wrong = [name for name, p in _trained(trainer.lightning_module) if p not in known]
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
        table = cut_table(unwrap(model), kept_entries(spec, lowered))
        cuts = {prefix + name: value for name, value in table.items()}
        done: list[Applied] = []
        rebuild(trainer, lambda: done.append(commit(model, spec, lowered)), cuts, reset=reset)
        return done[0]

    def finish(self, trainer: Trainer) -> None:
        """Build an engine without optimizer: masters of a merged model would be all of it again."""
        strategy: Any = trainer.strategy
        root = trainer.lightning_module
        _leave_flat_buffers(strategy, root, {})
        teardown(strategy, root)
        strategy._initialize_deepspeed_inference(root)

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
    saved = _taken_out(strategy, root, cuts, reset=reset)
    _leave_flat_buffers(strategy, root, cuts)
    optimizer = strategy.model.optimizer.optimizer
    positions = [config.scheduler.state_dict() for config in strategy.lr_scheduler_configs]
    rates = [group["lr"] for group in optimizer.param_groups]
    with strategy.reusing(optimizer) if not anew else contextlib.nullcontext():
        teardown(strategy, root)
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
    _put_back(strategy, root, saved)


def _own_again(optimizer: Any, root: nn.Module, names: list[list[str]]) -> None:
    """Put the module's parameters back into a torch optimizer whose tensors ZeRO had replaced."""
    named = dict(root.named_parameters())
    optimizer.state.clear()
    for group, members in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [named[name] for name in members]


def _taken_out(strategy: Any, root: nn.Module, cuts: Mapping[str, Cuts], *, reset: bool) -> Saved:
    engine, zero = strategy.model, strategy.model.optimizer
    saved = Saved(
        counters={name: getattr(engine, name) for name in _COUNTERS},
    )
    if not reset:
        _note_state(zero, saved)
    rank, world, known = dist.get_rank(), dist.get_world_size(), _known(zero)
    there = [(name, p) for name, p in _trained(root) if p in known]
    for number, (name, parameter) in enumerate(there):
        saved.owner[name] = number % world
        for key in (_MASTER, *saved.keys):
            smaller = cut(_complete(parameter, key), cuts.get(name, ()))
            saved.shapes[name] = smaller.shape
            if saved.owner[name] == rank:
                saved.tensors[name, key] = smaller.clone()
    return saved


def _note_state(zero: Any, saved: Saved) -> None:
    if not _is_stage_3(zero) and zero.optimizer.state:
        # Only the first group is linked to its state by itself.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for flat, state in zero.optimizer.state.items():
        same = {k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}
        saved.keys = tuple(sorted(same))
        saved.scalars = {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in state.items()
            if key not in same
        }
        break


def _put_back(strategy: Any, root: nn.Module, saved: Saved) -> None:
    engine, zero = strategy.model, strategy.model.optimizer
    for name, value in saved.counters.items():
        setattr(engine, name, value)
    # One step count serves all tensors of a flat one: those that are new do not start at 0 beside
    # others that go on. Alone they do.
    if saved.keys and any(name in saved.owner for name, _ in _trained(root)):
        _make_state(zero, saved)
    device = strategy.root_device
    for name, parameter in _trained(root):
        if name not in saved.owner:
            continue  # trainable only now
        for key in (_MASTER, *saved.keys):
            full = saved.tensors.pop((name, key), None)
            if full is None:
                full = torch.empty(saved.shapes[name], dtype=torch.float32, device=device)
            full = full.to(device)
            dist.broadcast(full, saved.owner[name])
            _set(parameter, key, full)


def _make_state(zero: Any, saved: Saved) -> None:
    """ZeRO makes optimizer state at the first step; here it must be there to be filled."""
    stage_3 = _is_stage_3(zero)
    flats = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        scalars = {k: v.clone() if torch.is_tensor(v) else v for k, v in saved.scalars.items()}
        zero.optimizer.state[flat] = {
            **scalars,
            **{key: torch.zeros_like(flat) for key in saved.keys},
        }
    if not stage_3:
        zero._lazy_init_hp_params_optimizer_state()


def _complete(parameter: nn.Parameter, key: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if key == _MASTER:
        return cast(Tensor, safe_get_full_fp32_param(parameter))
    return cast(Tensor, safe_get_full_optimizer_state(parameter, key))


def _set(parameter: nn.Parameter, key: str, full: Tensor) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_tensor"):
        # The setters of complete tensors fail where the parts are not of equal length.
        mine = zero_part(full)
        if key == _MASTER:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)
    elif key == _MASTER:
        safe_set_full_fp32_param(parameter, full)
    else:
        safe_set_full_optimizer_state(parameter, full, key)


def _leave_flat_buffers(strategy: Any, root: nn.Module, cuts: Mapping[str, Cuts]) -> None:
    """Stages 1 and 2: parameters are views of buffers that must go with the engine."""
    if _is_stage_3(strategy.model.optimizer):
        return
    for name, parameter in root.named_parameters():
        if name not in cuts:
            parameter.data = parameter.data.clone()


def _trained(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in root.named_parameters() if p.requires_grad)


def _known(zero: Any) -> set[nn.Parameter]:
    """Parameters an engine trains."""
    groups = zero.fp16_groups if _is_stage_3(zero) else zero.bit16_groups
    return {parameter for group in groups for parameter in group}


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _prefix(root: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in root.named_modules() if module is model)
    return f"{name}." if name else ""
