"""The plots of a report, the data they draw, and how numbers are shown.

Every plot function returns one `<svg>` element as text, drawn by matplotlib (`plprune.svg`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plprune.errors import ExportError
from plprune.svg import COLOURS, canvas, crosses, finish, note, scale, tip

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantile levels of a `ScoreSummary`."""

_LINES = (("kept", "-"), ("s2", "--"), ("s3", ":"), ("s1", "-."))  # colour and dashes of a curve


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Widths of one decoder layer, dense and kept."""

    layer: int
    """Index of the layer in the dense model."""
    dense: dict[str, int]
    """Axis kind -> width before, for example `{"kv_group": 3, "mlp": 1536}`."""
    kept: dict[str, int]
    """Axis kind -> width after; 0 everywhere for a removed layer."""


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """Distribution of the scores of one axis."""

    kind: str
    """Axis kind."""
    layer: int
    """Layer the axis belongs to."""
    quantiles: tuple[float, ...]
    """[7] scores at the levels `LEVELS` (lowest, 5, 25, 50, 75, 95 %, highest)."""
    threshold: float | None = None
    """Units that score below it were removed; None when nothing was removed."""

    def __post_init__(self) -> None:
        """Check the number of quantiles."""
        if len(self.quantiles) != len(LEVELS):
            raise ExportError(
                f"scores of {self.kind} in layer {self.layer} need one quantile per level",
                given=f"{len(self.quantiles)} quantiles",
                allowed=str(len(LEVELS)),
                fix="build it with ScoreSummary.of(kind=..., layer=..., scores=...)",
            )

    @classmethod
    def of(
        cls, *, kind: str, layer: int, scores: Sequence[float], threshold: float | None = None
    ) -> ScoreSummary:
        """Summarise the scores of one axis; levels between two scores are interpolated."""
        if not scores:
            raise ExportError(f"no scores of {kind} in layer {layer}", fix="leave the axis out")
        ranked = sorted(map(float, scores))
        places = [level * (len(ranked) - 1) for level in LEVELS]
        pairs = [(ranked[math.floor(p)], ranked[math.ceil(p)], p % 1) for p in places]
        found = tuple(a if a == b else a + (b - a) * part for a, b, part in pairs)
        return cls(kind=kind, layer=layer, quantiles=found, threshold=threshold)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity over optimizer steps."""

    name: str
    """Which run or data set: the legend entry."""
    step: tuple[int, ...]
    """[N] optimizer steps."""
    value: tuple[float, ...]
    """[N] values; non-finite ones are marked at the top of the plot."""
    quantity: str = "training loss"
    """Curves of the same quantity share a plot; also the axis label, so add the unit here."""

    def __post_init__(self) -> None:
        """Check that steps and values pair up."""
        if len(self.step) != len(self.value):
            raise ExportError(
                f"curve '{self.name}' needs one value per step",
                given=f"{len(self.step)} steps and {len(self.value)} values",
                fix="log both in the same place",
            )


def number(value: float | None) -> str:
    """Show a number for reading: grouped digits, the three or four that matter."""
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return f"not finite ({value})"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = ".2f" if abs(value) >= 10 else ".3f" if abs(value) >= 0.1 or not value else ".3g"
    return f"{value:{digits}}"


def percent(share: float) -> str:
    """Show a share as a percentage with one digit, never as "-0.0"."""
    return f"{round(share * 100, 1) + 0.0:,.1f} %" if math.isfinite(share) else number(share)


def width_plot(layers: Sequence[LayerWidths], kind: str, label: str) -> str:
    """Draw the width of one axis kind per layer: dense outline, kept part filled."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    rows = [
        (row.layer, row.dense[kind], row.kept.get(kind, 0)) for row in layers if kind in row.dense
    ]
    indices, before, after = zip(*rows, strict=True)
    with canvas() as figure:
        axes = figure.subplots()
        filled = axes.bar(indices, after, 0.72, color=COLOURS["kept"])
        outlines = axes.bar(indices, before, 0.72, fill=False, edgecolor=COLOURS["outline"])
        for (layer, dense, kept), *pair in zip(rows, filled, outlines, strict=True):
            for bar in pair:
                bar.set_gid(tip(f"layer {layer}: {kept:,} of {dense:,} kept"))
        axes.set_xlim(min(indices) - 0.5, max(indices) + 0.5)
        axes.set_ylim(0, 1.05 * max(1, *before, *after))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        legend = (("dense model", outlines[0]), ("kept", filled[0]))
        return finish(figure, ("layer", label), legend, f"{label} per layer")


def score_plot(scores: Sequence[ScoreSummary], label: str) -> str:
    """Draw score quantiles per layer with the threshold of the cut."""
    drawn = [row for row in scores if all(map(math.isfinite, row.quantiles[1:-1]))]
    values = [value for row in drawn for value in row.quantiles[1:-1]]
    values += [row.threshold for row in scores if row.threshold is not None]
    indices = [row.layer for row in scores]
    with canvas() as figure:
        axes = figure.subplots()
        axes.set_xlim(min(indices) - 0.5, max(indices) + 0.5)
        name = "score" + scale(axes, values)
        legend = _boxes(axes, drawn) if drawn else []
        legend += [("cut threshold", line) for line in _thresholds(axes, scores)[:1]]
        crosses(axes, [row.layer for row in scores if row not in drawn], COLOURS["outline"])
        return finish(figure, ("layer", name), legend, f"score of {label}")


def _boxes(axes: Axes, rows: Sequence[ScoreSummary]) -> list[tuple[str, Artist]]:
    """Draw a box with whiskers per row; returns the legend."""
    # `Axes.bxp` does the same but imports pyplot, which chooses a backend for the whole process.
    layers = [row.layer for row in rows]
    q05, q25, q50, q75, q95 = zip(*(row.quantiles[1:-1] for row in rows), strict=True)
    whiskers = axes.vlines(layers * 2, q05 + q75, q25 + q95, COLOURS["outline"])
    heights = [high - low for low, high in zip(q25, q75, strict=True)]
    faint, full = COLOURS["kept"] + "59", COLOURS["kept"]
    boxes = axes.bar(layers, heights, 0.6, q25, color=faint, edgecolor=full)
    sides = [layer - 0.3 for layer in layers], [layer + 0.3 for layer in layers]
    medians = axes.hlines(q50, *sides, COLOURS["text"])
    for row, box in zip(rows, boxes, strict=True):
        low, middle, high = map(number, row.quantiles[2:5])
        box.set_gid(tip(f"layer {row.layer}: median {middle}, middle half {low} to {high}"))
    return [("5 to 95 %", whiskers), ("25 to 75 %", boxes[0]), ("median", medians)]


def _thresholds(axes: Axes, rows: Sequence[ScoreSummary]) -> list[Line2D]:
    """Draw a dashed line per row that has a finite threshold."""
    lines: list[Line2D] = []
    for row in rows:
        if row.threshold is not None and math.isfinite(row.threshold):
            gid = tip(f"layer {row.layer}: cut threshold {number(row.threshold)}")
            ends = (row.layer - 0.48, row.layer + 0.48), (row.threshold, row.threshold)
            lines += axes.plot(*ends, color=COLOURS["cut"], linestyle="--", gid=gid)
    return lines


def curve_plot(
    curves: Sequence[Curve], cuts: Sequence[int], quantity: str, across: str = "optimizer step"
) -> str:
    """Draw curves over steps, or what `across` says; every cut is a vertical line."""
    steps = [*cuts, *(step for curve in curves for step in curve.step)]
    low, high = min(steps), max(max(steps), min(steps) + 1)
    with canvas() as figure:
        axes = figure.subplots()
        axes.set_xlim(low, high)
        name = quantity + scale(axes, [value for curve in curves for value in curve.value])
        legend = [
            (curve.name, _line(axes, curve, *_LINES[place % len(_LINES)]))
            for place, curve in enumerate(curves)
        ]
        legend += [("cut", line) for line in _cuts(axes, cuts)[:1]]
        title = f"{quantity} over {across.split()[-1]}s"
        return finish(figure, (across, name), legend, title)


def _line(axes: Axes, curve: Curve, colour: str, dashes: str) -> Line2D:
    """Draw a curve; it breaks at non-finite values, which get a cross at the top."""
    gid, colour = tip(curve.name), COLOURS[colour]
    fine = [False, *map(math.isfinite, curve.value), False]
    points = list(zip(curve.step, curve.value, fine[1:], fine, fine[2:], strict=False))
    value = [value if good else math.nan for _, value, good, *_ in points]
    (line,) = axes.plot(curve.step, value, color=colour, linestyle=dashes, gid=gid)
    # A point without neighbours has no line: one of no length and with round ends is a dot.
    alone = [(step, value) for step, value, good, *beside in points if good and not any(beside)]
    if alone:
        step, value = map(list, zip(*alone[:: 1 + len(alone) // 500], strict=True))
        axes.vlines(step, value, value, colour, linewidth=5, capstyle="round", gid=gid)
    crosses(axes, [step for step, _, good, *_ in points if not good], colour)
    return line


def _cuts(axes: Axes, cuts: Sequence[int]) -> list[Line2D]:
    """Draw a vertical line per cut, numbered where the number does not cover the one before."""
    low, high = axes.get_xlim()
    lines, free = [], low
    for place, step in enumerate(cuts, 1):
        gid = tip(f"cut {place} at step {step:,}")
        lines.append(axes.axvline(step, color=COLOURS["cut"], linestyle="--", gid=gid))
        if step >= free:
            note(axes, step, f"cut {place}", COLOURS["cut"])
            free = step + 0.07 * (high - low)
    return lines
