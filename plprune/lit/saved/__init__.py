"""What checkpoints hold, whichever strategy wrote them and on however many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plprune.lit.folders import require_parts
from plprune.lit.saved import fsdp2, single, zero
from plprune.lit.saved.state import SavedState, unpickled

__all__ = ["SavedState", "open_saved", "rest_of"]


def open_saved(path: Path) -> SavedState:
    """Open a checkpoint of any strategy.

    Args:
        path: file, or folder of FSDP2 or ZeRO.

    Returns:
        Its content; tensors are read when they are asked for.

    Raises:
        CheckpointError: if it is missing, incomplete, damaged, or of an unknown kind.
    """
    if not path.is_dir():
        return single.read(path)
    require_parts(path)
    return zero.read(path) if zero.is_one(path) else fsdp2.read(path)


def rest_of(path: Path) -> dict[str, Any]:
    """What a checkpoint of any strategy holds besides weights and optimizers; little is read.

    Args:
        path: file, or folder of FSDP2 or ZeRO.

    Returns:
        Position of the run, callbacks, what plprune added.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not path.is_dir():
        return dict(unpickled(path))
    require_parts(path)
    return zero.rest(path) if zero.is_one(path) else fsdp2.rest(path)
