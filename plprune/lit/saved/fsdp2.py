"""Folders of FSDP2: torch's distributed checkpoint, read on one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plprune.errors import CheckpointError, first_line
from plprune.lit.saved.state import GROUPS, PARTS, SavedState, unpickled

META = "meta.pt"
"""What is not divided."""
_WEIGHTS, _STATE = "state_dict.", "optimizer_0.state."


def read(path: Path) -> SavedState:
    """Open a folder.

    Args:
        path: written by torch's distributed checkpoint for Lightning.

    Returns:
        Its content; each tensor is put together when it is asked for.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = {
        name: entry
        for name, entry in FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    others = rest(path)
    groups = (others.get(PARTS) or {}).get(GROUPS) or []

    def whole(name: str) -> Tensor:
        entry = stored[name]
        wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        _load(wanted, path)
        return wanted[name]

    def entries(name: str, key: str | None, start: int, stop: int) -> Tensor:
        found = whole(f"{_WEIGHTS}{name}" if key is None else f"{_STATE}{name}.{key}")
        return found.reshape(-1)[start:stop]

    keys, scalars = dict[str, tuple[str, ...]](), dict[str, dict[str, Any]]()
    for name in [name for group in groups for name in group["names"]]:
        prefix, shape = f"{_STATE}{name}.", stored[_WEIGHTS + name].size
        own = {k.removeprefix(prefix): e.size for k, e in stored.items() if k.startswith(prefix)}
        keys[name] = tuple(sorted(key for key, size in own.items() if size == shape))
        scalars[name] = {key: whole(prefix + key) for key in own if key not in keys[name]}
    return SavedState(
        where=str(path),
        rest=others,
        shapes={
            name.removeprefix(_WEIGHTS): tuple(entry.size)
            for name, entry in stored.items()
            if name.startswith(_WEIGHTS)
        },
        read=entries,
        keys=keys,
        scalars=scalars,
    )


def rest(path: Path) -> dict[str, Any]:
    """What a folder holds besides weights and optimizers."""
    return dict(unpickled(path / META))


def _load(wanted: dict[str, Any], path: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        # It says that it reads on one process, which is what it is asked to do.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(wanted, checkpoint_id=path, no_dist=True)
        except (CheckpointException, OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(
                "the checkpoint cannot be read",
                given=f"{path}, at {next(iter(wanted))} ({first_line(error)})",
                allowed="a complete folder",
                fix="copy the folder again, completely, or take the checkpoint before it",
            ) from error
