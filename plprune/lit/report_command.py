"""`plprune report`: pages again from their JSON, for example after an update of the templates."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plprune.errors import ExportError, PlpruneError, first_line
from plprune.lit.messages import Parser


def run(args: Sequence[str]) -> None:
    """Write report.html, report.md and report.json.

    Args:
        args: command line after `report`.

    Raises:
        ExportError: if the file is no report, or the target cannot be written.
    """
    from plprune.report import Report, verdict
    from plprune.report_html import write

    given = _parser().parse_args(list(args))
    source = Path(given.report).expanduser()
    source = source / "report.json" if source.is_dir() else source
    try:
        data = json.loads(source.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            "cannot read the report",
            given=f"{source} ({error})",
            allowed="a report.json that plprune wrote, or its folder",
            fix="check the path",
        ) from error
    if not isinstance(data, dict) or not {"format", "verdict"} <= set(data):
        keys = f"the keys {', '.join(sorted(data)[:3]) or 'none'}" if isinstance(data, dict) else ""
        raise ExportError(
            "not a report",
            given=f"{source} with {keys or f'a {type(data).__name__}'}",
            allowed="a report.json that plprune wrote, or its folder",
            fix="check the path",
        )
    try:
        report = Report.from_json(data)
        list(verdict(report))  # what is missing shows when it is read
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        if isinstance(error, PlpruneError):
            raise
        raise ExportError(
            "the report is damaged",
            given=f"{source} ({first_line(error)})",
            allowed="a report.json as plprune wrote it",
            fix="take an undamaged copy, or run the fit again",
        ) from error
    target = source.parent if given.out is None else Path(given.out).expanduser()
    # The pages beside a report.json were made from it; nothing is lost.
    own = source.name == "report.json" and target.resolve() == source.parent.resolve()
    if not own and not given.overwrite:
        _require_empty(target)
    written = write(report, target, overwrite=own or given.overwrite)
    sys.stdout.write(f"report: {written / 'report.html'}\n")


def _require_empty(target: Path) -> None:
    """The check of `write`, in the words of the command line."""
    found = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if found:
        raise ExportError(
            "cannot write the report",
            given=f"{target} with {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}",
            allowed="the report's own folder, a new or empty one, or any with --overwrite",
            fix="add --overwrite (files other than the report's stay), or choose another --out",
        )


def _parser() -> Parser:
    parser = Parser(
        prog="plprune report",
        description="Write report.html and report.md again from a report.json.",
    )
    parser.add_argument("report", metavar="REPORT", help="report.json, or the folder it is in")
    parser.add_argument(
        "--out", metavar="DIR", help="where to write; default the folder of the report"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the report in another folder"
    )
    return parser
