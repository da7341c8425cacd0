"""FSDP2: weights, gradients and optimizer state divided by `fully_shard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from plprune.dist import together
from plprune.errors import ConfigError
from plprune.lit.saved.state import SavedState
from plprune.lit.strategies.base import Adapter, cut_in_place
from plprune.lit.strategies.filling import fill_groups, fill_part, require_same_tensors
from plprune.lit.strategies.fsdp2_groups import adopt, reshard
from plprune.lit.strategies.usable import require_one_dimension
from plprune.sharded import part, state_of
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied
from plprune.unwrap import family_of


class FSDP2(Adapter):
    """Weights, gradients and optimizer state divided by `fully_shard`."""

    def prepare(self, trainer: Trainer) -> None:
        """Refuse tensor parallelism and a torch whose FSDP2 is built otherwise."""
        strategy = trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy), "chosen by `adapter_for`"
        require_one_dimension(strategy)
        _require_known_torch()
        mend_saving(strategy)

    def verify(self, trainer: Trainer) -> None:
        """Refuse a model that nobody sharded: every process would train one of its own."""
        modules = trainer.lightning_module.modules()
        if not any(isinstance(module, FSDPModule) for module in modules):
            raise ConfigError(
                "nothing of the model is sharded",
                given=f"{type(trainer.lightning_module).__name__} without fully_shard",
                allowed="a configure_model that calls fully_shard",
                fix="fully_shard every block and then the model, with "
                'mesh=self.device_mesh["data_parallel"]',
            )

    def recut(
        self, trainer: Trainer, model: nn.Module, spec: Spec, lowered: Lowered, *, reset: bool
    ) -> Applied:
        """Commit a cut; see `Adapter.recut`."""
        self.rest(trainer)
        applied = cut_in_place(self.optimizers(trainer), model, spec, lowered, reset=reset)
        adopt(trainer.lightning_module)
        return applied

    def fits(self, trainer: Trainer, path: Path) -> bool:
        """Folders of FSDP2, whatever the number of processes; see `Adapter.fits`."""
        del trainer
        return (path / ".metadata").is_file()

    def fill(self, trainer: Trainer, saved: SavedState) -> None:
        """Every process reads its rows; see `Adapter.fill`."""
        root = trainer.lightning_module
        self.rest(trainer)
        with together():
            require_same_tensors(root, saved)
            with torch.no_grad():
                for name, tensor in state_of(root).items():
                    fill_part(part(tensor), tensor, saved, name)
            for optimizer in self.optimizers(trainer) if trainer.training else ():
                _fill_state(optimizer, dict(root.named_parameters()), saved)

    def rest(self, trainer: Trainer) -> None:
        """Free what FSDP keeps complete between passes: changes to that would be lost."""
        reshard(trainer.lightning_module)

    def rewrap(self, trainer: Trainer) -> None:
        """Shard what is new, forget what is gone; see `Adapter.rewrap`."""
        self.rest(trainer)
        adopt(trainer.lightning_module)


def _fill_state(optimizer: Any, named: Mapping[str, nn.Parameter], saved: SavedState) -> None:
    fill_groups(optimizer.param_groups, saved)
    for group in saved.groups:
        for name in group["names"]:
            parameter = named[name]
            state: dict[str, Any] = saved.numbers(name)
            for key in saved.keys.get(name, ()):
                state[key] = torch.zeros_like(parameter)
                fill_part(part(state[key]), parameter, saved, name, key)
            if state:
                optimizer.state[parameter] = state


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a language model block by block; a second call does nothing.

    Args:
        model: plain Hugging Face model, its parameters on the device of the mesh.
        mesh: one-dimensional.
    """
    if isinstance(model, FSDPModule):
        return
    family = family_of(model)
    blocks: Any = model.get_submodule(family.blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    embed, head = (model.get_submodule(path) for path in (family.embed, family.head))
    if embed.weight is not head.weight:
        # Gathered together they would be the largest piece of most models.
        fully_shard(embed, mesh=mesh)
        fully_shard(head, mesh=mesh)
    fully_shard(model, mesh=mesh)


def empty_shards(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide a model that has no weights yet and give it memory for this process's share.

    Args:
        model: plain Hugging Face model, parameters on the meta device, buffers with their values.
        mesh: one-dimensional.
        device: of the shares.
    """
    shard(model, mesh)
    untyped: Any = model
    untyped._apply(
        lambda tensor: (
            torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        )
    )


def mend_saving(strategy: ModelParallelStrategy) -> None:
    """Keep a checkpoint from changing the run that writes it.

    To save an optimizer that made no step yet, torch lets it make one on zero gradients: moments
    are zero as they should be, but the step counts, and bias corrections start one step late.

    Args:
        strategy: its `optimizer_state` is replaced, once.
    """
    if "optimizer_state" in vars(strategy):
        return
    own = strategy.optimizer_state

    def optimizer_state(optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "_optimizer", optimizer)
        fresh = not inner.state
        saved = own(optimizer)
        if fresh:
            inner.state.clear()
            for state in saved.get("state", {}).values():
                if "step" in state:
                    state["step"] = 0 * state["step"]
        return saved

    strategy.optimizer_state = optimizer_state  # type: ignore[method-assign]


def _require_known_torch() -> None:
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

        known = (
            "_fsdp_param_groups" in vars(FSDPState())
            and hasattr(FSDPParam, "reset_sharded_param")
            and hasattr(FSDPParamGroup, "_init_mp_dtypes")
        )
    except (ImportError, AttributeError):
        known = False
    if not known:
        raise ConfigError(
            "this torch has another FSDP2 than the one cuts were written for",
            given=f"torch {torch.__version__}",
            allowed="torch 2.13",
            fix="pip install torch==2.13.*, or train with ddp or zero3",
        )
