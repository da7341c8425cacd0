"""How a matplotlib figure becomes part of a report: one look, and an `<svg>` fit for a page.

An `<svg>` of `finish` has no script, font, style sheet, link or id, so any number of them can stand
in one page. Its colours are the CSS variables of `templates/report.html`: one drawing works on
light and dark pages.
"""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants colours, the page wants variables: "#2f6fb3" is written as `var(--kept)`.
COLOURS = {
    "text": "#1d2127",
    "quiet": "#5b6470",
    "rule": "#d9dde3",
    "outline": "#7b8592",
    "kept": "#2f6fb3",
    "cut": "#b8500b",
    "s1": "#8a5a00",
    "s2": "#0a7a5a",
    "s3": "#8f3f97",
}
_LOG_FROM = 20.0  # a logarithmic axis once the largest value is this many times the smallest
_TIP = "tip: "  # tells our group ids, which become tooltips, from those of matplotlib
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STYLE: dict[str, Any] = {
    "figure.figsize": (10.5, 3.6),  # 756 units wide: a unit is about a pixel of the page
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],  # measures texts; the page shows them in its own font
    "text.color": COLOURS["quiet"],
    "text.parse_math": False,  # a "$" in a name is a "$"
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["outline"],
    "axes.labelcolor": COLOURS["quiet"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "xtick.bottom": False,  # numbers without tick marks, which matplotlib draws by id
    "ytick.left": False,
    "xtick.color": COLOURS["quiet"],
    "ytick.color": COLOURS["quiet"],
    "lines.solid_capstyle": "butt",
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "path.simplify_threshold": 1.0,  # thins a long curve to what a unit of the drawing can show
    "svg.fonttype": "none",
}


@contextmanager
def canvas() -> Iterator[Figure]:
    """Give a figure in the look of the report, whatever the user's matplotlibrc says."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), style.context(["default", _STYLE]):
        # A letter this font lacks is shown all the same, by the font of the page.
        warnings.filterwarnings("ignore", "Glyph .* missing|.* does not support .* natively")
        yield Figure()


def tip(text: str) -> str:
    """Make the gid that gives an artist a tooltip."""
    return _TIP + clean(text)


def clean(text: str) -> str:
    """Replace what XML cannot hold."""
    return _NO_XML.sub("\ufffd", text)


def note(axes: Axes, place: float, text: str, colour: str, inside: bool = False) -> None:
    """Write a short text at the top of a place on the x axis, above the drawing or inside."""
    up: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "fontsize": 11}
    height, side = (1.0, "top") if inside else (1.02, "bottom")
    axes.text(place, height, text, va=side, color=colour, **up)


def crosses(axes: Axes, places: Sequence[float], colour: str) -> None:
    """Mark places on the x axis whose value cannot be drawn; the axis must have its limits."""
    low, high = axes.get_xlim()
    # One cross per percent of the axis is enough; more only makes the page heavier.
    apart = {round(100 * (place - low) / (high - low)): place for place in places}
    for place in apart.values():
        note(axes, place, "×", colour, inside=True)


def scale(axes: Axes, values: Sequence[float]) -> str:
    """Choose a logarithmic y axis if the finite values span that much; tell its name so."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low <= 0 or high / low <= _LOG_FROM:
        return ""
    axes.set_yscale("log")
    # Not a power of ten only: 2 and 5, too, while there are few powers.
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)) if high / low < 1000 else NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    return ", log scale"


def finish(
    figure: Figure, names: tuple[str, str], legend: Sequence[tuple[str, Artist]], label: str
) -> str:
    """Name the axes, add the legend and turn the figure into text.

    Args:
        figure: from `canvas`, with everything drawn on one pair of axes.
        names: of the x axis, which counts something, and of the y axis.
        legend: texts and what they explain.
        label: what the plot shows, for those who do not see it.

    Returns:
        One `<svg>` element.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    (axes,) = figure.axes
    whole = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(whole)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(clean(names[0]))
    axes.set_ylabel(textwrap.fill(clean(names[1]), 32))
    texts = [textwrap.fill(clean(text), 90) for text, _ in legend]
    columns = max(1, 90 // (8 + max(map(len, texts), default=0)))
    figure.legend([part for _, part in legend], texts, loc="outside upper left", ncols=columns)
    rows = "\n".join(texts[::columns]).count("\n")  # the drawing keeps its height
    figure.set_figheight(figure.get_figheight() + 0.25 * rows)
    drawing = StringIO()
    figure.savefig(drawing, format="svg")
    return _inline(ElementTree.fromstring(drawing.getvalue()), label)


def _inline(root: ElementTree.Element, label: str) -> str:
    """Strip what a page does not need and what would reach beyond the drawing."""
    for part in root.findall("{*}metadata") + root.findall("{*}defs"):
        root.remove(part)  # `defs` holds clip paths and a style sheet
    variables = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
    colours = re.compile("|".join(variables))
    for node in list(root.iter()):
        node.tag = node.tag.rpartition("}")[2]
        node.text, node.tail = (node.text or "").strip() or None, None
        node.attrib.pop("clip-path", None)
        gid = node.attrib.pop("id", "")
        if gid.startswith(_TIP):
            title = ElementTree.Element("title")
            title.text = gid.removeprefix(_TIP)
            node.insert(0, title)
        if style := node.get("style"):
            node.set("style", colours.sub(lambda found: variables[found[0]], style))
        if path := node.get("d"):  # a tenth of a unit is enough
            node.set("d", re.sub(r"(\.\d)\d+|\s+(?=[A-Zz])", r"\1", path))
    root.attrib = {"role": "img", "viewBox": root.attrib["viewBox"], "aria-label": clean(label)}
    root.set("stroke-linejoin", "round")  # stood in the style sheet
    return ElementTree.tostring(root, encoding="unicode")
