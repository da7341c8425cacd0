"""A DeepSpeed engine taken apart and built again around a module that changed.

DeepSpeed has no way to change shapes under an engine: parameters that are only replaced are trained
no more (stages 1 and 2) or end in an error (stage 3), and an engine that is destroyed stays alive
through module hooks, closures on modules and a global list. Everything that leans on its private
names stands in this file.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_ON_MODULES = (
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "ds_grads_remaining",
    "_external_params",
    "ds_recompute_parameters",
    "ds_inflight_param_registry",
    "ds_id",
)
_ON_PARAMETERS = (
    "_z3_optimizer",
    "_hp_mapping",
    "_zero_optimizer",
    "_dp_group",
    "_index_in_param_group",
)


def teardown(strategy: Any, root: nn.Module) -> None:
    """Free an engine completely and leave its module ready for another.

    Args:
        strategy: `ZeRO`; afterwards it has the bare module and no optimizers.
        root: the LightningModule.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine = strategy.model
    engine.destroy()
    for handle in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if handle is not None:
            handle.remove()
    strategy.optimizers, strategy.lr_scheduler_configs, strategy.model = [], [], root
    for module in root.modules():
        for name in _ON_MODULES:
            module.__dict__.pop(name, None)
        if module.__dict__.pop("_original_parameters", None) is not None:
            module._parameters = dict(module._parameters)
    for parameter in root.parameters():
        for name in _ON_PARAMETERS:
            parameter.__dict__.pop(name, None)
    parameter_offload.FWD_MODULE_STACK.clear()
    del engine
    gc.collect()


def give_timeout(timeout: timedelta | None) -> None:
    """Let every process group give up after the same time.

    The engine makes groups of its own, which would wait half an hour for a process that hangs.

    Args:
        timeout: of the strategy; None changes nothing.
    """
    from torch.distributed import distributed_c10d as c10d

    if timeout is not None:
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def kept_hooks(root: nn.Module) -> Iterator[None]:
    """Put back the module hooks that were there before, if they were taken off inside.

    Args:
        root: any module.
    """
    before = [
        (module, name, dict(getattr(module, name)))
        for module in root.modules()
        for name in _HOOKS
        if getattr(module, name, None)
    ]
    yield
    for module, name, hooks in before:
        table = getattr(module, name)
        for key, hook in hooks.items():
            table.setdefault(key, hook)
