"""The tables of a report as rows of text, equal on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from plprune.plots import number, percent
from plprune.report import KINDS, Report, Value, promised, ratio
from plprune.report_parts import CutRecord

# Keys every protocol should have; a missing one is shown as "not recorded".
PROTOCOL = (
    *("date", "data", "windows", "length", "evaluation_dtype", "training_precision"),
    *("seed", "tokenizer", "device", "versions", "plan_hashes", "command", "config"),
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
INNER = "query_in_group"  # axis kind whose widths count over all KV groups

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
    header = ("Tokens per second", "Dense", "Pruned", "Measured ratio", "Ratio in each round")
    rows: Rows = [(*header, "Ratio that counts promise")]
    for pair in report.speed:
        promise, what = promised(report, pair)
        expected = "not counted" if promise is None else f"{promise:.3f} ({what})"
        values = map(number, (pair.dense, pair.pruned, ratio(pair.pruned, pair.dense)))
        rows.append((f"{pair.phase}, {pair.timed}", *values, pair.spread, expected))
    return rows


def _widths(report: Report) -> Rows:
    rows: Rows = [("Per layer", "Dense", "Kept", "Layers changed", "Kept in all")]
    for kind, name in kinds(report).items():
        layers = [row for row in report.layers if kind in row.dense]
        pairs = [(row.dense[kind], row.kept.get(kind, 0)) for row in layers]
        dense, kept = zip(*pairs, strict=True)
        changed = f"{sum(a != b for a, b in pairs)} of {len(pairs)}"
        total = percent(sum(kept) / max(sum(dense), 1))
        rows.append((name, _span(dense), _span(kept), changed, total))
    return rows


def kinds(report: Report) -> dict[str, str]:
    """Axis kinds of the layers, with the names they are shown by."""
    return {kind: KINDS.get(kind, kind) for row in report.layers for kind in row.dense}


def _cuts(cuts: Sequence[CutRecord]) -> Rows:
    widths = [(per_group(cut.before), per_group(cut.after)) for cut in cuts]
    axes = dict.fromkeys(kind for pair in widths for side in pair for kind in side)
    if all(before.get(INNER) == after.get(INNER) for before, after in widths):
        axes.pop(INNER, None)  # only a plan that cuts inside KV groups gives it a column
    names = (KINDS.get(kind, kind) for kind in axes)
    rows: Rows = [("Cut", "Step", *names, "Parameters", "Share of time", "Plan")]
    for place, (cut, (before, after)) in enumerate(zip(cuts, widths, strict=True), 1):
        pairs = ((before.get(kind, ()), after.get(kind, ())) for kind in axes)
        cells = (f"{_span(old)} → {_span(new)}" for old, new in pairs)
        time = "not measured" if cut.time_share is None else percent(cut.time_share)
        plan = cut.plan_hash or "not recorded"
        rows.append((str(place), f"{cut.step:,}", *cells, number(cut.params), time, plan))
    return rows


def per_group(widths: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Widths with the query heads of a KV group, as budgets count them, instead of all.

    Args:
        widths: axis kind -> units of every block.
    """
    shown = dict(widths)
    if INNER in shown and "kv_group" in shown:
        pairs = zip(shown[INNER], shown["kv_group"], strict=False)
        shown[INNER] = tuple(heads // groups if groups else 0 for heads, groups in pairs)
    return shown


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


def missing(report: Report) -> str:
    """Name everything that was not measured: whole sections first, then single cells."""
    found = {**tables(report), "Scores": report.scores, "Curves": report.curves}
    absent = [
        title for title, content in {**found, "Samples": report.samples}.items() if not content
    ]
    gaps = [", ".join(absent)] if absent else []
    gaps += dict.fromkeys(_gaps(report))
    return f"Not measured: {'; '.join(gaps)}." if gaps else "Everything was measured."


def _gaps(report: Report) -> Iterator[str]:
    """Empty cells of the tables that are there."""
    for field, model in (
        ("dense", "the dense model"),
        ("dense_trained", "the dense model with the same training"),
        ("cut", "the pruned model without training"),
        ("recovered", "the pruned model after training"),
    ):
        texts = [score.data for score in report.perplexity if getattr(score, field) is None]
        # The name of the text says something only where another text was measured.
        which = "" if len(texts) == len(report.perplexity) else f" on {', '.join(texts)}"
        if texts:
            yield f"perplexity of {model}{which}"
    for name, size in report.sizes.items():
        if size.dense is None or size.pruned is None:
            yield SIZES.get(name, name)
    for pair in report.speed:
        if pair.dense is None or pair.pruned is None:
            yield f"speed of {pair.phase} at {pair.timed}"
    if any(cut.time_share is None for cut in report.cuts):
        yield "time of the cuts"
    if any(cut.params is None for cut in report.cuts):
        yield "parameters after the cuts"
    if any(sample.dense is None or sample.pruned is None for sample in report.samples):
        yield "some samples"
