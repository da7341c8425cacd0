"""Load a model straight into the shards of FSDP2 or ZeRO-3, at the size a checkpoint left it.

Each strategy that divides weights has two pieces here: how an empty model is divided, and how a
stored tensor gets into it. A model whose files transformers converts while it loads (names or
shapes of its own) is loaded whole on every process, as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from plprune.dist import together
from plprune.drivers.progressive import remember_dense
from plprune.lit import folders
from plprune.lit.carry import KEY
from plprune.lit.readable import require_readable
from plprune.lit.strategies.deepspeed import ZeRO
from plprune.lit.strategies.fsdp2 import empty_shards
from plprune.load import folder_of, note_structure
from plprune.load_check import check_folder
from plprune.skeleton import config_of, skeleton
from plprune.stream import Stored, as_loaded, fill, matched, stored_in
from plprune.surgery.rebuild import rebuild_with_cuts

log = logging.getLogger(__name__)


def streamed(
    module: LightningModule,
    pretrained: str,
    *,
    dtype: torch.dtype | None,
    attn_implementation: str,
    trust_remote_code: bool,
) -> nn.Module | None:
    """The model with this process's share of its weights, all of them divided.

    Args:
        module: asks, with its trainer's strategy set up.
        pretrained: folder or hub id.
        dtype: of the weights; None: what the config says. ZeRO-3 takes that of its precision.
        attn_implementation: as in transformers.
        trust_remote_code: allow Python code of the folder to run.

    Returns:
        The model; None if the strategy keeps whole weights, or the files must be converted.

    Raises:
        ModelError: for a folder that cannot be loaded.
        CheckpointError: if the checkpoint to resume from cannot be read.
        StructureError: if its structure belongs to another base.
    """
    if module._trainer is None:
        return None
    strategy: Any = module.trainer.strategy
    zero3 = isinstance(strategy, ZeRO) and strategy.zero_stage_3
    if not zero3 and module.device_mesh is None:
        return None
    with together():
        folder = folder_of(pretrained)
        check_folder(folder, trust_remote_code=trust_remote_code)
        model = skeleton(
            config_of(str(folder), trust_remote_code=trust_remote_code),
            dtype=strategy.weights_dtype(dtype) if zero3 else dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            buffers=True,
        )
        found = matched(model, stored_in(folder))
        if found is None:
            log.info("%s: its files are converted while they load, whole", pretrained)
            return None
        note_structure(model, folder)
        found = _at_saved_size(module.trainer, model, found)
    if zero3:
        _zero_parts(strategy, model, found)
    else:
        mesh: Any = module.device_mesh
        empty_shards(model, mesh["data_parallel"], strategy.root_device)
        state = model.state_dict(keep_vars=True)
        with torch.no_grad(), together():
            for name, stored in found.items():
                fill(state[name], stored)
    as_loaded(model, pretrained)
    return model


def _at_saved_size(
    trainer: Trainer, model: nn.Module, found: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Cut the empty model to the structure of the checkpoint that the run goes on from."""
    path = trainer.ckpt_path
    if path is None:
        return dict(found)
    require_readable(path)
    state = folders.parts_of(path, KEY).get("prune") or {}
    if "committed" not in state:
        return dict(found)
    dense, applied, table = rebuild_with_cuts(model, state["committed"])
    remember_dense(model, dense, applied.spec)
    left = {name: stored for name, stored in found.items() if name not in applied.gone}
    return {name: stored.cut(table.get(name, ())) for name, stored in left.items()}


def _zero_parts(strategy: ZeRO, model: nn.Module, found: Mapping[str, Stored]) -> None:
    """Rank 0 reads, all keep their parts, tensor after tensor."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, name))
    divide: Callable[[nn.Parameter], None] = strategy.divider()
    first = strategy.global_rank == 0
    names = dict(model.named_parameters())
    for name, empty in names.items():
        with together():
            full = torch.empty(empty.shape, dtype=empty.dtype, device=strategy.root_device)
            if first:
                full.copy_(found[name].read())
        made = nn.Parameter(full, requires_grad=empty.requires_grad)
        divide(made)
        for module, own in places[empty]:
            module._parameters[own] = made
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in found:
                buffer.copy_(found[name].read())
