"""Writes a report: one list of tables, rendered as an HTML page and as Markdown, beside the JSON.

The page stands alone: style and plots are inline, there is no script, and its security policy
forbids loading anything. All text that comes from outside is escaped.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TypeAlias

from plprune.errors import ExportError
from plprune.plots import curve_plot, number, percent, score_plot, width_plot
from plprune.report import KINDS, CutRecord, Report, Sample, SizePair, Value, ratio, verdict

# Keys every protocol should have; a missing one is shown as "not recorded".
PROTOCOL = (
    *("date", "data", "windows", "length", "dtype", "seed", "tokenizer", "device"),
    *("versions", "plan_hashes", "command", "config"),
)
# Known counts in the order of the page; others follow under their own name.
SIZES = {
    "params_prunable": "Parameters, prunable weights",
    "params_blocks": "Parameters, blocks",
    "params_non_embedding": "Parameters, all but embeddings",
    "params_model": "Parameters, whole model",
    "bytes": "Bytes of weights",
    "flops_per_token": "FLOPs per token",
    "kv_cache_bytes_per_token": "KV-cache bytes per token",
}
FILES = ("report.html", "report.json", "report.md")  # what `write` makes


Rows: TypeAlias = list[tuple[str, ...]]


def tables(report: Report) -> dict[str, Rows]:
    """Collect the tables by title: header, then rows that start with their name; or nothing."""
    found = {
        "Size and cost": _sizes(report),
        "Perplexity": _perplexity(report),
        "Speed": _speed(report),
        "Widths": _widths(report),
        "Cuts": _cuts(report.cuts),
        "Protocol": _protocol(report.protocol),
    }
    return {title: rows if len(rows) > 1 else [] for title, rows in found.items()}


def _change(share: float | None) -> tuple[str, str]:
    if share is None:
        return "not measured", "not measured"
    return f"{share:.3f}", ("+" if share > 1 else "") + percent(share - 1)


def _sizes(report: Report) -> Rows:
    rows: Rows = [("Counted from the tensors", "Dense", "Pruned", "Pruned / dense", "Change")]
    for name in dict.fromkeys((*SIZES, *report.sizes)):
        if pair := report.sizes.get(name):
            label = SIZES.get(name, name) + (f" ({pair.note})" if pair.note else "")
            share = ratio(pair.pruned, pair.dense)
            rows.append((label, number(pair.dense), number(pair.pruned), *_change(share)))
    return rows


def _perplexity(report: Report) -> Rows:
    scores = ("Dense", "Dense, same training", "Pruned, no training", "Pruned, trained")
    changes = ("Change to dense", "Change to dense, same training")
    rows: Rows = [("Text (lower is better)", *scores, *changes, "Seeds")]
    for score in report.perplexity:
        values = (score.dense, score.dense_trained, score.cut, score.recovered)
        bases = (score.dense, score.dense_trained)
        seeds = str(score.seeds) + ("" if score.spread is None else f" (± {number(score.spread)})")
        shares = (_change(ratio(score.final, base))[1] for base in bases)
        rows.append((score.data, *map(number, values), *shares, seeds))
    return rows


def _speed(report: Report) -> Rows:
    flops = report.sizes.get("flops_per_token", SizePair())
    promise = ratio(flops.dense, flops.pruned)
    header = ("Tokens per second", "Dense", "Pruned", "Measured ratio", "Ratio the FLOPs promise")
    rows: Rows = [header]
    for pair in report.speed:
        values = (pair.dense, pair.pruned, ratio(pair.pruned, pair.dense), promise)
        rows.append((f"{pair.phase}, batch {pair.batch}", *map(number, values)))
    return rows


def _widths(report: Report) -> Rows:
    rows: Rows = [("Per layer", "Dense", "Kept", "Layers changed", "Kept in all")]
    for kind, name in _kinds(report).items():
        layers = [row for row in report.layers if kind in row.dense]
        pairs = [(row.dense[kind], row.kept.get(kind, 0)) for row in layers]
        dense, kept = zip(*pairs, strict=True)
        changed = f"{sum(a != b for a, b in pairs)} of {len(pairs)}"
        total = percent(sum(kept) / max(sum(dense), 1))
        rows.append((name, _span(dense), _span(kept), changed, total))
    return rows


def _kinds(report: Report) -> dict[str, str]:
    return {kind: KINDS.get(kind, kind) for row in report.layers for kind in row.dense}


def _cuts(cuts: Sequence[CutRecord]) -> Rows:
    kinds = dict.fromkeys(kind for cut in cuts for kind in (*cut.before, *cut.after))
    names = (KINDS.get(kind, kind) for kind in kinds)
    rows: Rows = [("Cut", "Step", *names, "Parameters", "Share of time", "Plan")]
    for place, cut in enumerate(cuts, 1):
        pairs = ((cut.before.get(kind, ()), cut.after.get(kind, ())) for kind in kinds)
        widths = (f"{_span(before)} → {_span(after)}" for before, after in pairs)
        time = "not measured" if cut.time_share is None else percent(cut.time_share)
        plan = cut.plan_hash or "not recorded"
        rows.append((str(place), f"{cut.step:,}", *widths, number(cut.params), time, plan))
    return rows


def _span(widths: Sequence[int]) -> str:
    if not widths:
        return "not recorded"
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _protocol(protocol: dict[str, Value]) -> Rows:
    known: dict[str, Value] = {key: protocol.get(key) for key in PROTOCOL}
    return [("Setting", "Value"), *(_flat({**known, **protocol}) if protocol else ())]


def _flat(value: Value, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name} / {key}" if name else key)
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, "not recorded" if value in (None, "", {}) else str(value)


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = {"Base model": report.base_model, "Method": report.method}
    facts |= {"Budget asked": report.asked, "Budget got": report.got}
    return [(name, fact or "not recorded") for name, fact in facts.items()]


def _missing(report: Report) -> str:
    found = {**tables(report), "Scores": report.scores, "Curves": report.curves}
    absent = [
        title for title, content in {**found, "Samples": report.samples}.items() if not content
    ]
    return f"Not measured: {', '.join(absent)}." if absent else "Every section was measured."


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
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            lines += ["", f"{name}:", "", f"{fence}text", text, fence]
    return "\n".join([*lines, "", _missing(report), ""])


def _plain(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _texts(sample: Sample) -> list[tuple[str, str]]:
    texts = (("Prompt", sample.prompt), ("Dense", sample.dense), ("Pruned", sample.pruned))
    return [(name, "not generated" if text is None else text) for name, text in texts]


def page(report: Report) -> str:
    """Render the HTML page."""
    size, *quality, widths, cuts, protocol = (_html_table(*pair) for pair in tables(report).items())
    lines = verdict(report)
    parts = [size, *quality, _curves(report), widths, _layers(report), _scores(report), cuts]
    parts += [_samples(report), protocol, f'<p class="quiet">{escape(_missing(report))}</p>']
    facts = (f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in _facts(report))
    template = Template(files("plprune").joinpath("templates/report.html").read_text("utf-8"))
    return template.substitute(
        title=escape(report.title),
        facts="".join(facts),
        headline=escape(lines[0]),
        verdict="".join(f"<li>{escape(line)}</li>" for line in lines[1:]),
        notes="".join(f'<p class="note">Note: {escape(note)}</p>' for note in report.notes),
        body="\n".join(part for part in parts if part),
    )


def _html_table(title: str, rows: Rows) -> str:
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


def _figure(svg: str, text: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{escape(text)}</figcaption></figure>'


def _curves(report: Report) -> str:
    steps, drawn = [cut.step for cut in report.cuts], []
    for quantity in dict.fromkeys(curve.quantity for curve in report.curves if curve.step):
        curves = [curve for curve in report.curves if curve.quantity == quantity and curve.step]
        name = quantity[:1].upper() + quantity[1:]
        caption = f"{name}: how far it jumps at each cut, and how much training wins back."
        drawn.append(_figure(curve_plot(curves, steps, quantity), caption))
    return f"<section><h2>Training</h2>{''.join(drawn)}</section>" if drawn else ""


def _layers(report: Report) -> str:
    caption = "{}: the gap between the filled part and the outline is what each layer lost."
    drawn = ((width_plot(report.layers, *pair), pair[1]) for pair in _kinds(report).items())
    return "".join(_figure(svg, caption.format(name)) for svg, name in drawn)


def _scores(report: Report) -> str:
    drawn = []
    for kind in dict.fromkeys(row.kind for row in report.scores):
        rows, name = [row for row in report.scores if row.kind == kind], KINDS.get(kind, kind)
        caption = f"{name}: units that score below the threshold line of their layer were removed."
        drawn.append(_figure(score_plot(rows, name), caption))
    return f"<section><h2>Scores</h2>{''.join(drawn)}</section>" if drawn else ""


def _samples(report: Report) -> str:
    parts = []
    for sample in report.samples:
        cells = [f"<h3>{name}</h3><pre>{escape(text)}</pre>" for name, text in _texts(sample)]
        parts.append(f'<div class="sample"><div>{"</div><div>".join(cells)}</div></div>')
    return f"<section><h2>Greedy samples</h2>{''.join(parts)}</section>" if parts else ""


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
