"""Writes a report: one list of tables, rendered as an HTML page and as Markdown, beside the JSON.

The page stands alone: style and plots are inline, there is no script, and its security policy
forbids loading anything. All text that comes from outside is escaped.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from plprune.errors import ExportError
from plprune.plots import curve_plot, score_plot, width_plot
from plprune.report import KINDS, Report, verdict
from plprune.report_parts import Sample
from plprune.report_tables import Rows, kinds, missing, tables

CONFIG = "Complete configuration of the run"
FILES = ("report.html", "report.json", "report.md")  # what `write` makes


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = {"Base model": report.base_model, "Method": report.method}
    facts |= {"Budget asked": report.asked, "Budget got": report.got}
    return [(name, fact or "not recorded") for name, fact in facts.items()]


def to_markdown(report: Report) -> str:
    """Render everything but the plots as Markdown, for logs and model cards."""
    lines = [f"# {_plain(report.title)}", ""]
    lines += [f"- {name}: {_plain(fact)}" for name, fact in _facts(report)]
    lines += ["", "## Verdict", "", *(f"- {_plain(line)}" for line in verdict(report))]
    lines += [f"- Note: {_plain(note)}" for note in report.notes]
    for title, rows in tables(report).items():
        cells = [[_plain(cell) for cell in row] for row in rows]
        right = "---" if title == "Protocol" else "---:"
        cells[1:1] = [["---", *[right] * (len(row) - 1)] for row in rows[:1]]
        lines += ["", f"## {title}", ""] if rows else []
        lines += [f"| {' | '.join(row)} |" for row in cells]
    for place, sample in enumerate(report.samples, 1):
        lines += ["", f"## Sample {place}"]
        for name, text in _texts(sample):
            lines += ["", f"{name}:", "", *_fenced(text, "text")]
    if report.config:
        lines += ["", f"## {CONFIG}", "", *_fenced(report.config.rstrip(), "yaml")]
    return "\n".join([*lines, "", missing(report), ""])


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence + language, text, fence]


def _plain(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _texts(sample: Sample) -> list[tuple[str, str]]:
    texts = (("Prompt", sample.prompt), ("Dense", sample.dense), ("Pruned", sample.pruned))
    return [(name, "not generated" if text is None else text) for name, text in texts]


def page(report: Report) -> str:
    """Render the HTML page."""
    size, *quality, widths, cuts, protocol = (table_html(*pair) for pair in tables(report).items())
    lines = verdict(report)
    parts = [size, *quality, _curves(report), widths, _layers(report), _scores(report), cuts]
    parts += [
        _samples(report),
        protocol,
        _config(report),
        f'<p class="quiet">{escape(missing(report))}</p>',
    ]
    facts = (f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in _facts(report))
    template = Template(files("plprune.templates").joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        title=escape(report.title),
        facts="".join(facts),
        headline=escape(lines[0]),
        verdict="".join(f"<li>{escape(line)}</li>" for line in lines[1:]),
        notes="".join(f'<p class="note">Note: {escape(note)}</p>' for note in report.notes),
        body="\n".join(part for part in parts if part),
    )


def table_html(title: str, rows: Rows) -> str:
    """A section with a table.

    Args:
        title: of the section.
        rows: header first.
    """
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = []
    for name, *cells in rows[1:]:
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr><th scope="row">{escape(name)}</th>{data}</tr>')
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    css = title.split()[0].lower()
    return f'<section class="{css}"><h2>{title}</h2><div class="wide">{grid}</div></section>'


def figure_html(svg: str, text: str) -> str:
    """A plot with its caption.

    Args:
        svg: one element.
        text: caption.
    """
    return f'<figure><div class="wide">{svg}</div><figcaption>{escape(text)}</figcaption></figure>'


def _curves(report: Report) -> str:
    steps, drawn = [cut.step for cut in report.cuts], []
    for quantity in dict.fromkeys(curve.quantity for curve in report.curves if curve.step):
        curves = [curve for curve in report.curves if curve.quantity == quantity and curve.step]
        name = quantity[:1].upper() + quantity[1:]
        caption = f"{name}: how far it jumps at each cut, and how much training wins back."
        drawn.append(figure_html(curve_plot(curves, steps, quantity), caption))
    return f"<section><h2>Training</h2>{''.join(drawn)}</section>" if drawn else ""


def _layers(report: Report) -> str:
    caption = "{}: the gap between the filled part and the outline is what each layer lost."
    drawn = ((width_plot(report.layers, *pair), pair[1]) for pair in kinds(report).items())
    return "".join(figure_html(svg, caption.format(name)) for svg, name in drawn)


def _scores(report: Report) -> str:
    drawn = []
    for kind in dict.fromkeys(row.kind for row in report.scores):
        rows, name = [row for row in report.scores if row.kind == kind], KINDS.get(kind, kind)
        caption = f"{name}: units that score below the threshold line of their layer were removed."
        drawn.append(figure_html(score_plot(rows, name), caption))
    return f"<section><h2>Scores</h2>{''.join(drawn)}</section>" if drawn else ""


def _samples(report: Report) -> str:
    parts = []
    for sample in report.samples:
        cells = [f"<h3>{name}</h3><pre>{escape(text)}</pre>" for name, text in _texts(sample)]
        parts.append(f'<div class="sample"><div>{"</div><div>".join(cells)}</div></div>')
    return f"<section><h2>Greedy samples</h2>{''.join(parts)}</section>" if parts else ""


def _config(report: Report) -> str:
    text = f'<pre style="font-family: monospace">{escape(report.config)}</pre>'
    body = f"<details><summary>{CONFIG}</summary>{text}</details>"
    return f"<section>{body}</section>" if report.config else ""


def read(directory: Path) -> Report | None:
    """The report in a folder.

    Args:
        directory: perhaps one that `write` made.

    Returns:
        The report; None if there is none of this version.
    """
    try:
        return Report.from_json(json.loads((directory / "report.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(report: Report, directory: str | Path, overwrite: bool = False) -> Path:
    """Write report.html, report.json and report.md; a new directory appears complete or not at all.

    Args:
        report: what to write.
        directory: where.
        overwrite: replace the report that is already there; other files in the directory stay.

    Returns:
        The directory.
    """
    data = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
    texts = dict(zip(FILES, (page(report), data, to_markdown(report)), strict=True))
    target = Path(directory).resolve()
    found = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if target.is_file() or (found and not overwrite):
        given = f"{target.name} with {', '.join(found)}" if found else f"the file {target.name}"
        fix = "choose another directory" + (" or overwrite=True" if found else "")
        allowed = "a new or empty directory, or any directory with overwrite=True"
        raise ExportError("cannot write the report", given=given, allowed=allowed, fix=fix)
    stem = f".{target.name}.{uuid.uuid4().hex}"
    part, old = target.with_name(stem), target.with_name(stem + ".old")
    part.mkdir(parents=True)
    try:
        for name, text in texts.items():
            part.joinpath(name).write_text(text, "utf-8", errors="replace")
        if set(found) - set(FILES):  # the directory is not ours alone: replace file by file
            for name in FILES:
                part.joinpath(name).replace(target / name)
        else:
            if target.exists():
                target.rename(old)
            part.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return target
