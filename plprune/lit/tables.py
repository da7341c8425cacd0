"""Tables and numbers for a terminal; plain aligned lines where there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plprune.errors import ExportError
from plprune.files import write_text

Rows = Sequence[Sequence[str]]


def show(title: str, rows: Rows) -> None:
    """Write a table to standard output: drawn in a terminal, aligned columns in a file or pipe.

    Args:
        title: above it.
        rows: header, then lines of equal length.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for number, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
        return
    sys.stdout.write("\n".join([title, *aligned(rows)]) + "\n\n")


def aligned(rows: Rows) -> list[str]:
    """Lines with columns of equal width, the first to the left, the others to the right.

    >>> aligned([("cut", "step"), ("1", "1000")])
    ['cut  step', '1    1000']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return lines


def lines(title: str, facts: Sequence[tuple[str, object]]) -> None:
    """Write name and value, one a line; None values are left out.

    Args:
        title: above them.
        facts: names and values.
    """
    known = [(name, str(value)) for name, value in facts if value is not None]
    width = max((len(name) for name, _ in known), default=0)
    body = [f"{name.ljust(width)}  {value}" for name, value in known]
    sys.stdout.write("\n".join([title, *body]) + "\n\n")


def short(value: float | None, unit: str = "") -> str:
    """A number with four digits and a prefix.

    >>> short(1_269_309_440), short(512), short(3.5e6, "B"), short(None)
    ('1.269 G', '512', '3.5 MB', '-')
    """
    if value is None:
        return "-"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if prefix == "k" else size
            return f"{float(f'{value / scale:.4g}'):g} {prefix}{unit}"
    return f"{value:g}" + (f" {unit}" if unit else "")


def share(value: float | None) -> str:
    """A share in percent.

    >>> share(0.18826), share(None)
    ('18.8 %', '-')
    """
    return "-" if value is None else f"{100 * value:.1f} %"


def span(widths: int | Sequence[int]) -> str:
    """Widths of all blocks: one number if they agree.

    >>> span([4, 4]), span([3, 5]), span(7)
    ('4', '3..5', '7')
    """
    numbers = [widths] if isinstance(widths, int) else list(widths)
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}..{high}"


def put_json(target: str, value: dict[str, Any]) -> None:
    """Write JSON to a file, or to standard output for `-`.

    Args:
        target: file name or `-`; an existing file is replaced.
        value: plain values.

    Raises:
        ExportError: if the file cannot be written.
    """
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        write_text(Path(target).expanduser(), text)
    except OSError as error:
        raise _no_place(target, str(error.strerror)) from error


def require_place(target: str | None) -> None:
    """Refuse a file that `put_json` could not write, before hours of measuring.

    Args:
        target: file name, `-`, or None for neither.

    Raises:
        ExportError: if its folder does not exist, or it is a folder.
    """
    if target in (None, "-"):
        return
    path = Path(str(target)).expanduser()
    if path.is_dir():
        raise _no_place(str(path), "a folder")
    if not path.absolute().parent.is_dir():
        raise _no_place(str(path), "no such folder")


def _no_place(target: str, reason: str) -> ExportError:
    return ExportError(
        "cannot write the JSON file",
        given=f"{target} ({reason})",
        allowed="a file in an existing folder",
        fix="choose another --json",
    )
