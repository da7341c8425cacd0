"""Files that are either the old one or the complete new one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Args:
        path: file to write; its folder must exist.
        text: content.
    """
    path = Path(path)
    # Beside the file: a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as sink:
            sink.write(text)
        Path(name).chmod(0o644)  # mkstemp makes private files
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """Write JSON, see `write_text`.

    Args:
        path: file to write; its folder must exist.
        value: JSON-able value.
        indent: spaces per level.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
