"""The report of a run: its data, its JSON form and the plain sentences that follow from it.

`Report` is a value. Everything but the title may be missing: a section without data leaves the page
and is named under "Not measured". `report_html` writes a report as a page, as Markdown and as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from plprune.errors import ExportError
from plprune.plots import Curve, LayerWidths, ScoreSummary, number, percent
from plprune.report_json import decode, encode
from plprune.report_parts import CutRecord as CutRecord
from plprune.report_parts import Sample as Sample
from plprune.report_parts import Score as Score
from plprune.report_parts import SizePair as SizePair
from plprune.report_parts import SpeedPair as SpeedPair
from plprune.spec import SUBLAYERS

FORMAT = "plprune.report/1"  # version of the JSON form
GAIN = 1.05  # a lower speed ratio counts as no gain
KINDS = {
    "mlp": "MLP channels",
    "kv_group": "KV groups",
    "query_in_group": "query heads per KV group",
    "value_dim": "value channels",
    "attention_sublayer": "blocks with attention",
    "mlp_sublayer": "blocks with an MLP",
}
CHANNELS = ("mlp", "attn_read", "attn_write", "mlp_read", "mlp_write")  # multiples of 64 matter
Value: TypeAlias = str | int | float | bool | list[Any] | dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did, measured before and after."""

    title: str
    """Headline of the page."""
    base_model: str = ""
    """Name of the dense model."""
    method: str = ""
    """Method and its settings in a few words."""
    asked: str = ""
    """The budget that was asked for, in words."""
    got: str = ""
    """What the cuts reached, in words."""
    protocol: dict[str, Value] = field(default_factory=dict)
    """How it was measured: `report_html.PROTOCOL` lists the expected keys, others may follow."""
    sizes: dict[str, SizePair] = field(default_factory=dict)
    """Counts by name: `report_html.SIZES` lists the known names, others may follow."""
    perplexity: tuple[Score, ...] = ()
    """One entry per text, the most important first."""
    speed: tuple[SpeedPair, ...] = ()
    """Side-by-side speed measurements."""
    layers: tuple[LayerWidths, ...] = ()
    """Widths of every layer."""
    scores: tuple[ScoreSummary, ...] = ()
    """Score distributions of one cut (the last is usual), an entry per axis."""
    cuts: tuple[CutRecord, ...] = ()
    """Cuts in order."""
    curves: tuple[Curve, ...] = ()
    """Loss, validation perplexity and whatever else was logged over steps."""
    samples: tuple[Sample, ...] = ()
    """Greedy continuations."""
    notes: tuple[str, ...] = ()
    """Deviations from the protocol and other remarks, shown below the verdict."""
    config: str = ""
    """Complete configuration of the run as YAML; empty for a run that had none."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a non-finite number is null and listed in `non_finite`."""
        odd: list[list[Any]] = []
        body = encode(self, [], odd)
        return {"format": FORMAT, "verdict": verdict(self), **body, "non_finite": odd}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Rebuild a report from what `to_json` returned, exactly."""
        if data.get("format") != FORMAT:
            given, fix = repr(data.get("format")), "write the report again with this plprune"
            raise ExportError("not a report of this version", given=given, allowed=FORMAT, fix=fix)
        derived = ("format", "verdict", "non_finite")
        odd = {tuple(at): float(text) for at, text in data.get("non_finite", ())}
        body = {key: value for key, value in data.items() if key not in derived}
        return cast("Report", decode(cls, body, (), odd))


def same_run(written: Report, again: Report) -> bool:
    """Whether a report is that of a run whose end is done again.

    Args:
        written: by the run, before it was interrupted.
        again: by the same run, from its last checkpoint; a validation after that may be missing.

    Returns:
        True if base model, method, budget, widths, plans of all cuts, and what was noted of the
        training are the same; what was measured at the end may differ by rounding.
    """
    told = [
        (r.base_model, r.method, r.asked, r.got, r.layers, [(c.step, c.plan_hash) for c in r.cuts])
        for r in (written, again)
    ]
    noted = {
        curve.name: list(zip(curve.step, curve.value, strict=True)) for curve in written.curves
    }
    return told[0] == told[1] and all(
        len(noted.get(curve.name, ())) >= len(curve.step)
        and all(
            step == number and math.isclose(value, there, rel_tol=1e-6)
            for step, value, (number, there) in zip(
                curve.step, curve.value, noted[curve.name], strict=False
            )
        )
        for curve in again.curves
    )


def ratio(after: float | None, before: float | None) -> float | None:
    """Divide two measurements; None when one is missing or the base is zero."""
    return None if after is None or not before else after / before


def verdict(report: Report) -> list[str]:
    """Say in plain sentences what was gained and what was not; the first sums up the others."""
    size = report.sizes.get("params_model", SizePair())
    score = (*report.perplexity, Score(data=""))[0]
    decode = (*(pair for pair in report.speed if pair.phase == "decode"), None)[0]
    smaller = _less(ratio(size.pruned, size.dense))
    worse = _worse(ratio(score.final, score.dense))
    first = f"Against the dense model: {smaller}; perplexity {worse}; decoding {_faster(decode)}."
    parts = (_size_sentences, _score_sentences, _speed_sentences, _width_sentences)
    return [first, *(line for part in parts for line in part(report))]


def _less(share: float | None) -> str:
    if share is None or share == 1:
        return "parameters not counted" if share is None else "as many parameters"
    return f"{percent(abs(1 - share))} {'fewer' if share < 1 else 'more'} parameters"


def _worse(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "was not measured" if share is None else f"is {number(share)}: the model is broken"
    if abs(share - 1) < 5e-4:
        return "is unchanged"
    return f"got {'worse' if share > 1 else 'better'} by {percent(abs(share - 1))}"


def _faster(pair: SpeedPair | None) -> str:
    share = None if pair is None else ratio(pair.pruned, pair.dense)
    if pair is None or share is None:
        return "was not timed on both models"
    # A gain that some round did not show is within the spread of the measurement.
    if share >= GAIN:
        word = "faster" if min(pair.rounds, default=share) > 1 else "not clearly faster"
    elif share < 2 - GAIN:
        word = "slower" if max(pair.rounds, default=share) < 1 else "not clearly slower"
    else:
        word = "not faster"
    return f"is {word}, {share:.2f} times the dense speed"


def promised(report: Report, pair: SpeedPair) -> tuple[float | None, str]:
    """The speed ratio that the counts let expect, and of what it is a ratio.

    Prefill is arithmetic; a decoded token waits for the weights to come out of memory.

    Args:
        report: with its sizes.
        pair: one of its measurements.

    Returns:
        Ratio (None if not counted) and a name of the quantity.
    """
    if pair.phase == "decode":
        size = report.sizes.get("bytes", SizePair())
        return ratio(size.dense, size.pruned), "bytes of weights"
    if pair.flops_ratio is not None:
        return pair.flops_ratio, f"FLOPs at {pair.prompt:,} tokens" if pair.prompt else "FLOPs"
    size = report.sizes.get("flops_per_token", SizePair())
    return ratio(size.dense, size.pruned), f"FLOPs {size.note}".rstrip()


def _size_sentences(report: Report) -> Iterator[str]:
    kept = all(row.kept.get("kv_group") == row.dense.get("kv_group") for row in report.layers)
    for name, what, no_gain in (
        ("params_model", "parameters", "The model is not smaller"),
        ("bytes", "bytes of weights", "The weights do not take less memory"),
        ("flops_per_token", "FLOPs per token", "A token does not need less arithmetic"),
        ("kv_cache_bytes_per_token", "bytes of KV cache per token", "The KV cache is not smaller"),
    ):
        pair = report.sizes.get(name, SizePair())
        share = ratio(pair.pruned, pair.dense)
        if share is None:
            continue
        why = " because no KV group was removed" if kept and name.startswith("kv") else ""
        gain = no_gain + why if share >= 1 else f"{percent(1 - share)} less"
        yield f"{gain}: {number(pair.dense)} to {number(pair.pruned)} {what}."


def _score_sentences(report: Report) -> Iterator[str]:
    for score in report.perplexity:
        share, same = ratio(score.final, score.dense), ratio(score.final, score.dense_trained)
        if share is None:
            continue
        when = "without recovery training" if score.recovered is None else "after recovery training"
        numbers = f"{number(score.dense)} to {number(score.final)}"
        yield f"Perplexity on {score.data} {_worse(share)}: {numbers}, {when}."
        if score.recovered is None and share > 1.25:
            yield "That much without recovery training: read the samples before using the model."
        if same is not None:
            yield f"Against the dense model trained with the same recipe it {_worse(same)}."
        elif score.recovered is not None:
            yield "No dense model was trained with the same recipe: part of this may be training."
        if abs(share - 1) < 0.03 and score.seeds < 3:
            yield "A difference below 3 % is no result without three seeds."


def _speed_sentences(report: Report) -> Iterator[str]:
    for pair in report.speed:
        name = {"prefill": "Prefill", "decode": "Decoding"}.get(pair.phase, pair.phase)
        comma = "" if pair.prompt is None else ","
        opening = f"{name} at {pair.timed}{comma} {_faster(pair)}"
        if ratio(pair.pruned, pair.dense) is None:
            yield f"{opening}."
            continue
        facts = [f"{number(pair.dense)} to {number(pair.pruned)} tokens/s"]
        if pair.rounds:
            facts.append(f"{len(pair.rounds)} rounds: {pair.spread} times")
        promise, what = promised(report, pair)
        if promise is not None:
            facts.append(f"the {what} promise {promise:.2f} times")
        yield f"{opening} ({'; '.join(facts)})."


def _depth_sentence(kind: str, rows: Sequence[tuple[int, int]]) -> Iterator[str]:
    gone = [block for block, (kept, dense) in enumerate(rows) if kept < dense]
    if gone:
        half = "attention" if kind == SUBLAYERS[0] else "MLP"
        yield f"{half} removed in {len(gone)} of {len(rows)} blocks: {spans(gone)}."


def spans(numbers: Sequence[int]) -> str:
    """Numbers in order, neighbours together: `0, 3 to 5`."""
    runs: list[list[int]] = []
    for one in numbers:
        if runs and runs[-1][-1] == one - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)


def _width_sentences(report: Report) -> Iterator[str]:
    for kind in dict.fromkeys(kind for row in report.layers for kind in row.dense):
        rows = [
            (row.kept.get(kind, 0), row.dense[kind]) for row in report.layers if kind in row.dense
        ]
        odd = [kept for kept, dense in rows if kept != dense and kept % 64]
        widths, name = {kept for kept, _ in rows if kept}, KINDS.get(kind, kind)
        if kind in SUBLAYERS:
            yield from _depth_sentence(kind, rows)
            continue
        if odd and kind in CHANNELS:
            which = f"{len(odd)} of {len(rows)} layers, such as {odd[0]:,}"
            yield f"{name}: widths not multiples of 64 ({which}) lose part of the gain on GPUs."
        if len(widths) > 1:
            span = f"{min(widths):,} to {max(widths):,}"
            yield f"{name}: {span} kept, so layers differ and stock classes cannot load them."
