"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plprune.errors import ExportError, first_line
from plprune.load import STRUCTURE_FILE


@contextlib.contextmanager
def staging(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside the target that takes its place when the block ends well.

    Args:
        target: folder to be written.
        overwrite: replace one that plprune wrote.

    Yields:
        The folder to write into.

    Raises:
        ExportError: says what stands in the way; the target is as it was before.
    """
    _check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise ExportError(
            "cannot write beside the export's target",
            given=f"{target.parent} ({error.strerror})",
            allowed="a folder this process may write to",
            fix="choose another directory, or change its permissions",
        ) from error
    from safetensors import SafetensorError

    try:
        work = room / target.name  # made here, it gets ordinary permissions; mkdtemp's are private
        work.mkdir()
        yield work
        _check_target(target, overwrite=overwrite)  # it may have appeared meanwhile
        if target.exists():
            target.rename(room / "replaced")
        try:
            work.rename(target)
        except OSError:
            if (room / "replaced").exists():
                (room / "replaced").rename(target)
            raise
    except (OSError, SafetensorError) as error:
        raise ExportError(
            "the export could not be written",
            given=first_line(error),
            fix="check disk space and permissions, then export again; the target is as it was",
        ) from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise ExportError(
            "the export's target exists",
            given=str(target),
            allowed="a new folder",
            fix="choose another directory, or replace this one with --overwrite (overwrite: true)",
        )
    ours = target.is_dir() and not target.is_symlink()
    if not ours or (any(target.iterdir()) and not (target / STRUCTURE_FILE).is_file()):
        raise ExportError(
            "will not overwrite something that is no export of plprune",
            given=str(target),
            allowed=f"a folder with {STRUCTURE_FILE}, or an empty one",
            fix="choose another directory, or remove this one yourself",
        )


def require_space(folder: Path, needed: int) -> None:
    """Refuse a disk that is too full.

    Args:
        folder: existing, on it.
        needed: bytes.

    Raises:
        ExportError: saying how much is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            "not enough space for the export",
            given=f"{free / 1e6:.4g} MB free",
            allowed=f"at least {needed / 1e6:.4g} MB",
            fix="free some space, export to another disk, or set dtype: bfloat16",
        )
