"""Checkpoints that are folders: strategies that divide the weights let every rank write its part.

A folder is written under another name and renamed when all ranks are done, so that what has the
final name is complete. The file `plprune.pt` is written last and holds what travels with the
weights; `plprune_structure.json` is the same structure to read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy

from plprune.dist import together
from plprune.errors import CheckpointError
from plprune.files import write_json
from plprune.load import STRUCTURE_FILE

log = logging.getLogger(__name__)

PARTS_FILE = "plprune.pt"


def are_written_by(strategy: Strategy) -> bool:
    """True if the checkpoints of a strategy are folders."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy._save_distributed_checkpoint
    return isinstance(strategy, DeepSpeedStrategy)


def save(
    strategy: Strategy, write: Callable[[Any], None], parts: Mapping[str, Any], filepath: Any
) -> None:
    """Save a folder that appears under its name only when it is complete; called on all ranks.

    Args:
        strategy: of the trainer.
        write: saves to the path it is given, on all ranks.
        parts: what travels with the weights.
        filepath: final name.
    """
    final = Path(strategy.broadcast(str(filepath)))
    temporary = final.with_name(f".{final.name}.tmp")
    with together():
        if strategy.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    strategy.barrier()
    with together():
        if strategy.is_global_zero:
            structure = parts.get("prune", {}).get("structure")
            if structure is not None:
                write_json(temporary / STRUCTURE_FILE, structure, indent=1)
            torch.save(dict(parts), temporary / PARTS_FILE)
            _take_place(temporary, final)


def _take_place(new: Path, final: Path) -> None:
    """Rename a folder over another; between the two renames the old one waits beside."""
    old = _beside(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def recover(path: Path) -> None:
    """Give a checkpoint its name back if a process was killed while replacing it.

    Args:
        path: where the checkpoint should be.
    """
    if not path.exists() and _beside(path).exists():
        try:
            _beside(path).rename(path)
        except FileNotFoundError:  # another process of the run was faster
            return
        log.warning("%s was being replaced when its run was killed: the one before is back", path)


def parts_of(path: Any, key: str) -> dict[str, Any]:
    """Read what travels with the weights, without reading the weights.

    Args:
        path: folder, or single file of a strategy that can write both.
        key: name of the parts in a single file.

    Returns:
        Saved parts by name.

    Raises:
        CheckpointError: if the folder is not complete.
    """
    found = Path(path)
    if found.is_dir():
        require_parts(found)
        parts: dict[str, Any] = torch.load(
            found / PARTS_FILE, map_location="cpu", weights_only=True
        )
        return parts
    whole = torch.load(found, map_location="cpu", weights_only=True, mmap=True)
    return dict(whole.get(key, {}))


def require_parts(folder: Path) -> None:
    """Refuse a folder that is no checkpoint, or lacks what is written last.

    Args:
        folder: existing.

    Raises:
        CheckpointError: naming it.
    """
    if not (folder / PARTS_FILE).is_file():
        raise CheckpointError(
            "the checkpoint is not complete",
            given=f"{folder} without {PARTS_FILE}, which is written last",
            allowed="a folder saved by a run with plprune callbacks",
            fix="check the path, or take the checkpoint before it",
        )
