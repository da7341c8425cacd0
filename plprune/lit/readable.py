"""Checkpoints are looked at before anything is built for them."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from plprune.errors import CheckpointError
from plprune.lit import folders
from plprune.lit.saved.complete import require_complete


def require_readable(path: Any) -> None:
    """Refuse a checkpoint file that is missing or cut short, before anything is built for it.

    Args:
        path: local file or folder; remote places and Lightning's keywords are left to Lightning.

    Raises:
        CheckpointError: naming the file.
    """
    file = Path(str(path))
    if "://" in str(path):
        return
    folders.recover(file)
    if file.is_dir():
        require_complete(file)
        return
    if not file.exists():
        raise CheckpointError("there is no such checkpoint", given=str(path), fix="check ckpt_path")
    with file.open("rb") as opened:
        if file.stat().st_size and not b"PK\x03\x04".startswith(opened.read(4)):
            raise _no_checkpoint(f"{path}, another kind of file")
    if not zipfile.is_zipfile(file):
        raise damaged(path, f"{file.stat().st_size} bytes without an end")
    with contextlib.suppress(pickle.UnpicklingError):  # said, or allowed, where it is loaded
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        keys = list(found) if isinstance(found, dict) else []
        if not {"state_dict", "pytorch-lightning_version"} <= set(keys):
            raise _no_checkpoint(
                f"{path}, which holds {', '.join(map(str, keys[:3])) or type(found)}"
            )


def _no_checkpoint(given: str) -> CheckpointError:
    return CheckpointError(
        "this is no checkpoint of Lightning",
        given=given,
        allowed="what ModelCheckpoint or trainer.save_checkpoint wrote",
        fix="check ckpt_path; give weights alone as model.pretrained",
    )


def damaged(path: Any, why: str) -> CheckpointError:
    """What to say of a file that cannot be read.

    Args:
        path: of it.
        why: what is wrong.
    """
    return CheckpointError(
        "the checkpoint is damaged",
        given=f"{path}: {why}",
        allowed="a complete file written by Lightning",
        fix="resume from the checkpoint before it",
    )
