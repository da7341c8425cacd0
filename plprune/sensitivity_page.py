"""What single cuts cost, as a page with plots, a table to read, and numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plprune.export_folder import staging
from plprune.plots import Curve, curve_plot, number
from plprune.report import KINDS
from plprune.report_html import figure_html, table_html
from plprune.stats.losses import LossCurve

_LABELS = {
    **KINDS, "block": "block", "attention_sublayer": "attention", "mlp_sublayer": "MLP"
}  # fmt: skip
"""Kinds in words; here a sublayer is one layer's."""
FILES = ("sensitivity.html", "sensitivity.json")


def as_plain(
    found: Mapping[str, tuple[str, int, LossCurve]],
    protocol: Mapping[str, Any],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Numbers of a measurement.

    Args:
        found: axis name -> kind, block, losses.
        protocol: how it was measured, plain values.
        sizes: axis name -> its units; where rounding left all of them, nothing was cut.

    Returns:
        The protocol, the dense perplexity, and a row for every axis and width.
    """
    rows = []
    for name, (kind, block, curve) in found.items():
        # Of few units several shares are the same number.
        losses = dict(zip(curve.units_G.tolist(), curve.loss_G.tolist(), strict=True))
        for units, loss in losses.items():
            if units == (sizes or {}).get(name):
                continue
            perplexity = math.exp(min(loss / float(curve.n), 700.0))
            rows.append(
                {
                    "axis": name,
                    "kind": kind,
                    "block": block,
                    "units": int(units),
                    "perplexity": perplexity,
                }
            )
    first = next(iter(found.values()))[2]
    dense = math.exp(float(first.dense) / float(first.n))
    return {"protocol": dict(protocol), "dense_perplexity": dense, "rows": rows}


def table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: layer, kind, units, perplexity, times dense.

    Args:
        result: from `as_plain`.
    """
    rows: list[tuple[str, ...]] = [("layer", "axis", "units left", "perplexity", "x dense")]
    for row in result["rows"]:
        times = row["perplexity"] / result["dense_perplexity"]
        rows.append(
            (
                str(row["block"]),
                row["kind"],
                str(row["units"]),
                number(row["perplexity"]),
                f"{times:.3f}",
            )
        )
    return rows


def page(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page.

    Args:
        result: from `as_plain`.
    """
    rows = result["rows"]
    body = [figure_html(_plot(rows, kind), _caption(kind)) for kind in _kinds(rows)]
    body.append(table_html("Single cuts", table(result)))
    protocol: list[tuple[str, ...]] = [
        ("setting", "value"),
        *((k, str(v)) for k, v in result["protocol"].items()),
    ]
    body.append(table_html("Protocol", protocol))
    worst = max(rows, key=lambda row: row["perplexity"])
    template = Template(files("plprune.templates").joinpath("report.html").read_text("utf-8"))
    return template.substitute(
        title="What single cuts cost",
        facts=f"<div><dt>dense perplexity</dt><dd>{number(result['dense_perplexity'])}</dd></div>",
        headline=escape(
            f"Layer {worst['block']} needs its {_LABELS.get(worst['kind'], worst['kind'])} most: "
            f"perplexity {number(worst['perplexity'])} {_left(worst['units'])}."
        ),
        verdict="",
        notes='<p class="note">Note: every axis is cut alone, the rest is dense; costs of several '
        "cuts do not simply add.</p>",
        body="\n".join(body),
    )


def write(result: Mapping[str, Any], directory: Path) -> Path:
    """Write page and numbers; the folder appears complete or not at all.

    Args:
        result: from `as_plain`.
        directory: where; it must not exist.

    Returns:
        The page.
    """
    with staging(directory, overwrite=False) as part:
        (part / FILES[0]).write_text(page(result), encoding="utf-8")
        (part / FILES[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return directory / FILES[0]


def _kinds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))


def _caption(kind: str) -> str:
    label = _LABELS.get(kind, kind)
    return f"{label[0].upper()}{label[1:]}: perplexity of the model with this layer alone cut."


def _left(units: int) -> str:
    return f"with {units} units left" if units else "without"


def _plot(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    own = [row for row in rows if row["kind"] == kind]
    widths = sorted({row["units"] for row in own}, reverse=True)
    curves = []
    for units in widths:
        points = [(row["block"], row["perplexity"]) for row in own if row["units"] == units]
        blocks, values = zip(*points, strict=True)
        name = f"{units} units left" if units else "without"
        curves.append(Curve(name=name, step=blocks, value=values))
    return curve_plot(curves, (), "perplexity", across="layer")
