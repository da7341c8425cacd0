"""FSDP2: the parameters a cut replaced take the places of the old ones in FSDP's groups.

`fully_shard` keeps an entry per parameter that knows its shape and puts the parameter back into its
module before and after every pass: one that is merely replaced in the module is thrown out again,
silently. So each entry whose parameter changed is made anew, and nothing else of the wrapper is
touched: modules, hooks, meshes and policies stay. One complete tensor is alive at a time.

Leans on private names of torch (`_fsdp_param_groups`, `FSDPParam`); `FSDP2.prepare` checks them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


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
            if not group.fsdp_params:
                _let_go(cast(FSDPModule, module), group)


def _let_go(module: FSDPModule, group: Any) -> None:
    """Drop the group of a removed block: there is nothing to gather."""
    state: Any = module._get_fsdp_state()
    state._fsdp_param_groups.remove(group)


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
