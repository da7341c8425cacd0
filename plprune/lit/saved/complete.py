"""Whether a checkpoint folder has all its files, and each of them its end."""

from __future__ import annotations

import zipfile
from pathlib import Path

from plprune.errors import CheckpointError, first_line
from plprune.lit.folders import PARTS_FILE
from plprune.lit.saved.fsdp2 import META
from plprune.lit.saved.zero import INSIDE, files, processes

_INDEX, _PIECES = ".metadata", "*.distcp"


def require_complete(path: Path) -> None:
    """Refuse a folder of FSDP2 or DeepSpeed that lacks files, or ends of files.

    Only names, sizes and ends are looked at, and FSDP2's index.

    Args:
        path: of a checkpoint; other folders are left alone.

    Raises:
        CheckpointError: naming the first file that is wrong.
    """
    if (path / INSIDE).is_dir():
        _require_zero(path)
    elif (path / _INDEX).exists() or (path / META).exists() or any(path.glob(_PIECES)):
        _require_fsdp2(path)


def _require_zero(path: Path) -> None:
    models, others = files(path, "model_states"), files(path, "optim_states")
    for file in (*models, *others, path / PARTS_FILE):
        if file.exists():
            _require_end(path, file)
    if not models or not others:
        raise _damaged(path, f"no file of {'optimizers' if models else 'weights'}")
    ranks = {_rank(file, "model_states") for file in models if file.name.startswith("zero_pp")}
    states = {_rank(file, "optim_states") for file in others}
    # Stages 1 and 2 have one file of weights for all, under another name.
    differ = sorted(ranks ^ states) if ranks else []
    if differ:
        kind = "optim" if differ[0] in ranks else "model"
        raise _damaged(path, f"no {differ[0]}{kind}_states.pt")
    world = processes(others[0])
    if len(states) != world:
        raise _damaged(path, f"optimizer files of {len(states)} of {world} processes")


def _rank(file: Path, kind: str) -> str:
    return file.name.removesuffix(f"{kind}.pt").removeprefix("bf16_")


def _require_fsdp2(path: Path) -> None:
    for name in (_INDEX, META):
        if not (path / name).exists():
            raise _damaged(path, f"no {name}")
    for file in (path / META, path / PARTS_FILE):
        if file.exists():
            _require_end(path, file)
    for name, size in _sizes(path).items():
        there = (path / name).stat().st_size if (path / name).exists() else None
        if there is None or there < size:
            raise _damaged(
                path, f"no {name}" if there is None else f"{name} with {there} of {size} bytes"
            )


def _sizes(path: Path) -> dict[str, int]:
    """What the index says: file -> bytes it has at least."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        stored = FileSystemReader(path).read_metadata().storage_data or {}
        found: dict[str, int] = {}
        for info in stored.values():
            found[info.relative_path] = max(
                found.get(info.relative_path, 0), info.offset + info.length
            )
    except Exception as error:  # a pickle that is cut short fails in many ways
        raise _damaged(path, f"{_INDEX} cannot be read: {first_line(error)}") from error
    return found


def _require_end(path: Path, file: Path) -> None:
    if not zipfile.is_zipfile(file):
        size = file.stat().st_size
        raise _damaged(path, f"{file.relative_to(path)}: {size} bytes without an end")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint is incomplete",
        given=f"{path} ({why})",
        allowed="a complete folder",
        fix="copy the folder again, completely, or take the checkpoint before it",
    )
