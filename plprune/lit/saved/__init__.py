"""What checkpoints hold, whichever strategy wrote them and on however many processes."""

from __future__ import annotations

from pathlib import Path

from plprune.errors import CheckpointError
from plprune.lit.folders import PARTS_FILE
from plprune.lit.saved import fsdp2, single, zero
from plprune.lit.saved.state import SavedState

__all__ = ["SavedState", "open_saved"]


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
    if not (path / PARTS_FILE).is_file():
        raise CheckpointError(
            "the checkpoint is not complete",
            given=f"{path} without {PARTS_FILE}, which is written last",
            allowed="a folder saved by a run with plprune callbacks",
            fix="check the path, or take the checkpoint before it",
        )
    return zero.read(path) if zero.is_one(path) else fsdp2.read(path)
