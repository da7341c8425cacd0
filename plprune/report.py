"""The report of a run: its data, its JSON form and the plain sentences that follow from it.

`Report` is a value. Everything but the title may be missing: a section without data leaves the page
and is named under "Not measured". `report_html` writes a report as a page, as Markdown and as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias, cast, get_args, get_origin, get_type_hints

from plprune.errors import ExportError
from plprune.plots import Curve, LayerWidths, ScoreSummary, number, percent

FORMAT = "plprune.report/1"  # version of the JSON form
GAIN = 1.05  # a lower speed ratio counts as no gain
KINDS = {"mlp": "MLP channels", "kv_group": "KV groups", "value_dim": "value channels"}
CHANNELS = ("mlp", "attn_read", "attn_write", "mlp_read", "mlp_write")  # multiples of 64 matter
Value: TypeAlias = str | int | float | bool | list[Any] | dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class SizePair:
    """One quantity counted before and after."""

    dense: float | None = None
    """Count of the dense model."""
    pruned: float | None = None
    """Count of the pruned model."""
    note: str = ""
    """What the count depends on, for example "at a context of 1,024 tokens"."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Perplexity on one text, under the protocol of the report; None means not measured."""

    data: str
    """Name of the text."""
    dense: float | None = None
    """The dense model as loaded."""
    dense_trained: float | None = None
    """The dense model after the same training recipe and tokens."""
    cut: float | None = None
    """The pruned model without training."""
    recovered: float | None = None
    """The pruned model after training."""
    seeds: int = 1
    """Runs behind the figures (their mean)."""
    spread: float | None = None
    """Standard deviation of the last figure over the runs."""

    @property
    def final(self) -> float | None:
        """Score of the model the run ended with."""
        return self.cut if self.recovered is None else self.recovered


@dataclass(frozen=True, kw_only=True)
class SpeedPair:
    """Tokens per second of both models, measured side by side in one process."""

    phase: str
    """`prefill` or `decode`."""
    batch: int
    """Sequences at once."""
    dense: float | None = None
    """Tokens per second of the dense model."""
    pruned: float | None = None
    """Tokens per second of the pruned model."""


@dataclass(frozen=True, kw_only=True)
class CutRecord:
    """One cut."""

    step: int
    """Optimizer step it happened at."""
    before: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Axis kind -> width per layer before the cut."""
    after: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Axis kind -> width per layer after the cut."""
    params: int | None = None
    """Parameters of the whole model after the cut."""
    time_share: float | None = None
    """Seconds of the cut divided by the seconds of the run."""
    plan_hash: str = ""
    """Hash of the plan that was applied."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Greedy continuations of one prompt."""

    prompt: str
    """The text both models continue."""
    dense: str | None = None
    """Continuation by the dense model."""
    pruned: str | None = None
    """Continuation by the pruned model."""


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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a non-finite number is null and listed in `non_finite`."""
        odd: list[list[Any]] = []
        body = _encode(self, [], odd)
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
        return cast("Report", _decode(cls, body, (), odd))


def _encode(value: Any, at: list[Any], odd: list[list[Any]]) -> Any:
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): _encode(item, [*at, str(key)], odd) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, [*at, place], odd) for place, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        odd.append([at, str(value)])
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise ExportError(
        f"JSON cannot hold the value at {'.'.join(map(str, at))}",
        given=type(value).__name__,
        allowed="text, numbers, true/false, null, lists, dictionaries",
        fix="convert it with str(), float() or int() first",
    )


def _decode(kind: Any, value: Any, at: tuple[Any, ...], odd: dict[tuple[Any, ...], float]) -> Any:
    if at in odd:
        return odd[at]
    origin, hints = get_origin(kind), get_type_hints(kind) if is_dataclass(kind) else {}
    inner = get_args(kind)[-1] if origin is dict else get_args(kind)[0] if origin is tuple else None
    try:
        if hints:
            found = {key: _decode(hints[key], value[key], (*at, key), odd) for key in value}
            return kind(**found)
        if isinstance(value, dict):
            return {key: _decode(inner, item, (*at, key), odd) for key, item in value.items()}
        if isinstance(value, list):
            items = [_decode(inner, item, (*at, place), odd) for place, item in enumerate(value)]
            return tuple(items) if origin is tuple else items
    except (KeyError, TypeError) as error:
        where, fix = ".".join(map(str, at)) or "the report", "use a file that plprune wrote"
        given, allowed = str(value)[:200], ", ".join(hints)
        raise ExportError(f"cannot read {where}", given=given, allowed=allowed, fix=fix) from error
    return value


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
    faster = _faster(ratio(decode.pruned, decode.dense) if decode else None)
    first = f"Against the dense model: {smaller}; perplexity {worse}; decoding {faster}."
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


def _faster(share: float | None) -> str:
    if share is None:
        return "was not timed on both models"
    word = "faster" if share >= GAIN else "slower" if share < 2 - GAIN else "not faster"
    return f"is {word}, {share:.2f} times the dense speed"


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
    flops = report.sizes.get("flops_per_token", SizePair())
    promise = ratio(flops.dense, flops.pruned)
    end = "" if promise is None else f"; the FLOPs promise {promise:.2f} times"
    for pair in report.speed:
        share = ratio(pair.pruned, pair.dense)
        name = {"prefill": "Prefill", "decode": "Decoding"}.get(pair.phase, pair.phase)
        rates = f" ({number(pair.dense)} to {number(pair.pruned)} tokens/s{end})" if share else ""
        yield f"{name} at batch {pair.batch} {_faster(share)}{rates}."


def _width_sentences(report: Report) -> Iterator[str]:
    for kind in dict.fromkeys(kind for row in report.layers for kind in row.dense):
        rows = [
            (row.kept.get(kind, 0), row.dense[kind]) for row in report.layers if kind in row.dense
        ]
        odd = [kept for kept, dense in rows if kept != dense and kept % 64]
        widths, name = {kept for kept, _ in rows if kept}, KINDS.get(kind, kind)
        if odd and kind in CHANNELS:
            which = f"{len(odd)} of {len(rows)} layers, such as {odd[0]:,}"
            yield f"{name}: widths not multiples of 64 ({which}) lose part of the gain on GPUs."
        if len(widths) > 1:
            span = f"{min(widths):,} to {max(widths):,}"
            yield f"{name}: {span} kept, so layers differ and stock classes cannot load them."
