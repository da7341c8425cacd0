"""FSDP2: the parameters a cut replaced take the places of the old ones in FSDP's groups.

`fully_shard` keeps an entry per parameter that knows its shape and puts the parameter back into its
module before and after every pass: one that is merely replaced in the module is thrown out again,
silently. So each entry whose parameter changed is made anew, and nothing else of the wrapper is
touched: modules, hooks, meshes and policies stay. One complete tensor is alive at a time.

Leans on private names of torch (`_fsdp_param_groups`, `FSDPParam`); `require` checks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from plprune.errors import ConfigError
from plprune.lit.strategies.base import Adapter, cut_in_place
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied
from plprune.unwrap import family_of


class FSDP2(Adapter):
    """Weights, gradients and optimizer state divided by `fully_shard`."""

    def prepare(self, trainer: Trainer) -> None:
        """Refuse tensor parallelism and a torch whose FSDP2 is built otherwise."""
        strategy = trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy), "chosen by `adapter_for`"
        size = strategy.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise ConfigError(
                "tensor parallelism cannot be cut during fit",
                given=f"tensor_parallel_size {size}",
                allowed="1",
                fix="set tensor_parallel_size: 1 and data_parallel_size to the number of devices",
            )
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

    def rest(self, trainer: Trainer) -> None:
        """Free what FSDP keeps complete between passes: changes to that would be lost."""
        reshard(trainer.lightning_module)

    def rewrap(self, trainer: Trainer) -> None:
        """Shard what is new, forget what is gone; see `Adapter.rewrap`."""
        self.rest(trainer)
        adopt(trainer.lightning_module)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a language model block by block; a second call does nothing.

    Args:
        model: plain Hugging Face model, its parameters on the device of the mesh.
        mesh: one-dimensional.
    """
    if isinstance(model, FSDPModule):
        return
    blocks: Any = model.get_submodule(family_of(model).blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
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


def reshard(root: nn.Module) -> None:
    """Free complete parameters that FSDP keeps between passes.

    Args:
        root: any module with FSDP modules in it.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def adopt(root: nn.Module) -> None:
    """Make FSDP's groups manage exactly the parameters that the modules have now.

    Args:
        root: any module with FSDP modules in it, resharded. Parameters that are new may be sharded
            already, or complete; then those of rank 0 count.
    """
    present = set(root.modules())
    owner = dict(_owners(root))
    known: set[nn.Parameter] = set()
    for module in root.modules():
        for group in _groups(module):
            group.fsdp_params = [
                entry
                for entry in (_renewed(group, old, present) for old in group.fsdp_params)
                if entry is not None
            ]
            known |= {entry.sharded_param for entry in group.fsdp_params}
    for module in list(root.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in known and module in owner:
                group = _groups(cast(nn.Module, owner[module]))[0]
                group.fsdp_params.append(_entry(group, parameter.detach(), module, name, parameter))
                known.add(group.fsdp_params[-1].sharded_param)
    for module in root.modules():
        for group in _groups(module):
            _refresh(group)


def _groups(module: nn.Module) -> list[Any]:
    if not isinstance(module, FSDPModule):
        return []
    state: Any = module._get_fsdp_state()
    return list(state._fsdp_param_groups) if state._modules[0] is module else []


def _owners(root: nn.Module) -> Iterator[tuple[nn.Module, FSDPModule]]:
    """Every module below an FSDP module, with the nearest one."""

    def walk(module: nn.Module, nearest: FSDPModule | None) -> Iterator[Any]:
        nearest = module if isinstance(module, FSDPModule) else nearest
        if nearest is not None:
            yield module, nearest
        for child in module.children():
            yield from walk(child, nearest)

    return walk(root, None)


def _renewed(group: Any, old: Any, present: set[nn.Module]) -> Any:
    """The entry itself, another for a parameter that changed, or None for one that is gone."""
    info = old._module_info
    current = info.module._parameters.get(info.param_name) if info.module in present else None
    if current is old.sharded_param:
        if hasattr(old, "_unsharded_param"):  # made once; it would go on asking for gradients
            old._unsharded_param.requires_grad_(current.requires_grad)
        return old
    old._post_load_hook_handle.remove()
    if current is None:
        return None
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    # Made for the new shape without data; then it gets the parameter that surgery made.
    shape = torch.empty(current.shape, dtype=current.dtype, device="meta")
    place = old.fsdp_placement
    entry: Any = FSDPParam(
        nn.Parameter(shape, requires_grad=current.requires_grad),
        info,
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda _: place,
        group.mp_policy,
        group.offload_policy,
    )
    entry.sharded_param = current
    entry._setattr_on_modules(current)
    entry.reset_sharded_param()
    entry._param_fqn = old._param_fqn
    return entry


def _entry(
    group: Any, full: torch.Tensor, module: nn.Module, name: str, parameter: nn.Parameter
) -> Any:
    """An entry for a complete parameter that no group knows yet; all get that of rank 0."""
    full = full.to(group.device).contiguous()
    torch.distributed.broadcast(full, 0)
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    return FSDPParam(
        nn.Parameter(full, requires_grad=parameter.requires_grad),
        ParamModuleInfo(module, name),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        group.mp_policy,
        group.offload_policy,
    )


def _refresh(group: Any) -> None:
    """Number formats and state-dict hooks follow the parameters of the group."""
    group._init_mp_dtypes()
    saving = group._module_to_pre_save_state_dict_hook_handle
    loading = group._module_to_pre_load_state_dict_hook_handle
    if saving:
        for handle in (*saving.values(), *loading.values()):
            handle.remove()
        saving.clear()
        loading.clear()
        group._register_state_dict_hooks()


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
