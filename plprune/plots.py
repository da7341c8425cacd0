"""Small inline SVG plots of a report, the data they draw, and how numbers are shown.

Every plot function returns one `<svg>` element as text: no script, no font, no file. Colours come
from CSS classes (`templates/report.html`), so that one drawing works on light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter

from plprune.errors import ExportError

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantile levels of a `ScoreSummary`."""

_WIDTH, _HEIGHT = 760, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 34, 44
_LOG_FROM = 20.0  # a logarithmic axis once the largest value is this many times the smallest
_MAX_POINTS = 600  # about one point per pixel; more only makes the page heavier


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


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Data ranges and their mapping to the drawing area."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def px(self, value: float) -> float:
        low, high = self.x
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def py(self, value: float) -> float:
        low, high = self.y
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 1)

    def draw(
        self, body: str, *, axes: tuple[str, str], legend: Sequence[tuple[str, str]], label: str
    ) -> str:
        """Put axes, grid and legend around a drawing; `legend` pairs a CSS class with a text."""
        bottom, right, parts = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, []
        for tick in _log_ticks(*self.y) if self.log else _ticks(*self.y):
            y = self.py(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
            parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4}">{_tick_text(tick)}</text>')
        for tick in _ticks(*self.x, count=12, whole=True):
            x = self.px(tick)
            parts.append(f'<text class="mid" x="{x}" y="{bottom + 16}">{_tick_text(tick)}</text>')
        middle, center = (_TOP + bottom) / 2, (_LEFT + right) / 2
        parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        parts.append(f'<text class="mid" x="{center}" y="{_HEIGHT - 6}">{escape(axes[0])}</text>')
        y_label = escape(axes[1] + (", log scale" if self.log else ""))
        turn = f'transform="translate(13 {middle}) rotate(-90)"'
        parts.append(f'<text class="mid" {turn}>{y_label}</text>')
        x = float(_LEFT)
        for css, text in legend:
            swatch = "9h18v9h-18z" if css in ("kept", "dense", "box") else "14h18"
            parts.append(f'<path class="{css}" d="M{x} {swatch}"/>')
            parts.append(f'<text x="{x + 24}" y="18">{escape(text)}</text>')
            x += 44 + 6.6 * len(text)
        head = f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{escape(label)}">'
        return head + "".join(parts) + body + "</svg>"


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
    rows = [
        (row.layer, row.dense[kind], row.kept.get(kind, 0)) for row in layers if kind in row.dense
    ]
    indices = [layer for layer, _, _ in rows]
    top = max(max(dense, kept) for _, dense, kept in rows)
    frame = _Frame(x=(min(indices) - 0.5, max(indices) + 0.5), y=(0, max(top * 1.02, 1)))
    base, body = frame.py(0), []
    for layer, dense, kept in rows:
        left, right = frame.px(layer - 0.36), frame.px(layer + 0.36)
        tip = f"<title>layer {layer}: {kept:,} of {dense:,} kept</title>"
        for css, value in (("kept", kept), ("dense", dense)):
            y = frame.py(value)
            size = f'width="{right - left:.1f}" height="{base - y:.1f}"'
            body.append(f'<rect class="{css}" x="{left}" y="{y}" {size}>{tip}</rect>')
    legend = (("dense", "dense model"), ("kept", "kept"))
    return frame.draw(
        "".join(body), axes=("layer", label), legend=legend, label=f"{label} per layer"
    )


def score_plot(scores: Sequence[ScoreSummary], label: str) -> str:
    """Draw score quantiles per layer with the threshold of the cut."""
    inner = [value for row in scores for value in row.quantiles[1:-1]]
    inner += [row.threshold for row in scores if row.threshold is not None]
    indices = [row.layer for row in scores]
    y, log = _range(inner)
    frame = _Frame(x=(min(indices) - 0.5, max(indices) + 0.5), y=y, log=log)
    whiskers, boxes, medians, cuts = [], [], [], []
    for row in scores:
        left, right = frame.px(row.layer - 0.3), frame.px(row.layer + 0.3)
        if row.threshold is not None and math.isfinite(row.threshold):
            ends = f"M{frame.px(row.layer - 0.48)} {frame.py(row.threshold)}"
            cuts.append(f"{ends}H{frame.px(row.layer + 0.48)}")
        if not all(map(math.isfinite, row.quantiles[1:-1])):
            whiskers.append(_cross(frame.px(row.layer)))
            continue
        q05, q25, q50, q75, q95 = map(frame.py, row.quantiles[1:-1])
        whiskers.append(f"M{frame.px(row.layer)} {q05}V{q95}")
        boxes.append(f"M{left} {q25}H{right}V{q75}H{left}z")
        medians.append(f"M{left} {q50}H{right}")
    drawn = (("whisker", whiskers), ("box", boxes), ("median", medians), ("cut", cuts))
    body = "".join(f'<path class="{css}" d="{"".join(d)}"/>' for css, d in drawn if d)
    legend = [("whisker", "5 to 95 %"), ("box", "25 to 75 %"), ("median", "median")]
    legend += [("cut", "cut threshold")] if cuts else []
    label = f"score of {label}"
    return frame.draw(body, axes=("layer", "score"), legend=legend, label=label)


def curve_plot(curves: Sequence[Curve], cuts: Sequence[int], quantity: str) -> str:
    """Draw curves over steps; every cut is a vertical line."""
    points = [pair for curve in curves for pair in zip(curve.step, curve.value, strict=True)]
    steps = [step for step, _ in points] + list(cuts)
    y, log = _range([value for _, value in points])
    frame = _Frame(x=(min(steps), max(max(steps), min(steps) + 1)), y=y, log=log)
    body, legend = [], []
    for number, step in enumerate(cuts, 1):
        x = frame.px(step)
        body.append(f'<path class="cut" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        if len(cuts) <= 12:
            body.append(f'<text class="note" x="{x + 4}" y="{_TOP + 10}">cut {number}</text>')
    for number, curve in enumerate(curves):
        css = f"line s{number % 4}"
        body.append(f'<path class="{css}" d="{_line(frame, curve)}"/>')
        legend.append((css, curve.name))
    legend += [("cut", "cut")] if cuts else []
    label = f"{quantity} over steps"
    return frame.draw("".join(body), axes=("optimizer step", quantity), legend=legend, label=label)


def _line(frame: _Frame, curve: Curve) -> str:
    """Trace a curve; the pen lifts at non-finite values, which get a cross at the top."""
    path, down = [], False
    for step, value in _thin(tuple(zip(curve.step, curve.value, strict=True))):
        if math.isfinite(value):
            path.append(f"{'L' if down else 'M'}{frame.px(step)} {frame.py(value)}")
        else:
            path.append(_cross(frame.px(step)))
        down = math.isfinite(value)
    if len(path) == 1:  # a single point has no length: draw a short dash
        path.append("h3")
    return "".join(path)


def _cross(x: float) -> str:
    return f"M{x - 3} {_TOP - 3}l6 6m0 -6l-6 6"


def _thin(points: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """Keep the lowest, the highest and every non-finite point of each stretch of steps."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size, kept = math.ceil(len(points) / (_MAX_POINTS / 2)), []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=itemgetter(1)), max(finite, key=itemgetter(1))} if finite else set()
        broken = [point for point in part if not math.isfinite(point[1])][:1]
        kept += sorted([*ends, *broken])
    return kept


def _range(values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """Find the data range and whether it needs a logarithmic axis."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low > 0 and high / low > _LOG_FROM:
        return (low / 1.1, high * 1.1), True
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return (low - margin, high + margin), False


def _ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Choose round numbers between two values, about `count` of them."""
    raw = (high - low) / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 5, 10) if m * base >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose 1, 2, 5 per decade; decades only when there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1, 2, 5) if high / low < 1000 else (1,)
    every = max(1, len(decades) // 6)
    found = [m * 10.0**d for d in decades[::every] for m in marks]
    return [tick for tick in found if low <= tick <= high]


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
