"""From a finished run to the values a report and a model card print."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from plprune.count import Tally, count_flops, count_params, tally_dense
from plprune.drivers.progressive import Progressive, dense_and_now
from plprune.lit.protocol import run_seed
from plprune.plots import Curve, LayerWidths, ScoreSummary
from plprune.report_parts import CutRecord, Score, SizePair, SpeedPair
from plprune.spec import SUBLAYERS, Spec
from plprune.timing import SpeedResult


def sizes(dense: Tally, now: Tally) -> dict[str, SizePair]:
    """Counts before and after, all from tensors.

    Args:
        dense: before.
        now: after.

    Returns:
        Pairs under the names of `report_html.SIZES`.
    """
    pairs = {
        f"params_{base}": SizePair(dense=dense.params.of(base), pruned=now.params.of(base))
        for base in ("prunable", "blocks", "non_embedding", "model")
    }
    formats = dict.fromkeys((dense.formats, now.formats))
    pairs["bytes"] = SizePair(
        dense=dense.bytes, pruned=now.bytes, note=f"{', then '.join(formats)} while it is trained"
    )
    pairs["flops_per_token"] = SizePair(
        dense=dense.flops.model, pruned=now.flops.model, note=f"at {now.context} tokens of context"
    )
    pairs["kv_cache_bytes_per_token"] = SizePair(
        dense=dense.kv_cache, pruned=now.kv_cache, note="bfloat16"
    )
    return pairs


def dense_tally(model: nn.Module, context: int) -> Tally:
    """Counts of the model a run starts from, also where it was built smaller for a checkpoint.

    Args:
        model: the run's, before its first step.
        context: context length for FLOPs.
    """
    dense, now = dense_and_now(model)
    return tally_dense(model, now, dense, context=context)


def layers(progressive: Progressive) -> tuple[LayerWidths, ...]:
    """Widths of every layer, dense and kept."""
    dense, kept = progressive.dense, progressive.spec
    depth = SUBLAYERS if kept.removed() else ()
    kinds = [kind for kind in (*dense.kinds(), *depth) if kind != "query_in_group"]
    return tuple(
        LayerWidths(
            layer=number,
            dense={
                "heads": block.heads,
                **{kind: dense.of_kind(kind)[number].size for kind in kinds},
            },
            kept={
                "heads": kept.blocks[number].heads,
                **{kind: kept.of_kind(kind)[number].size for kind in kinds},
            },
        )
        for number, block in enumerate(dense.blocks)
    )


def scores(progressive: Progressive) -> tuple[ScoreSummary, ...]:
    """Score distributions of the last cut."""
    if not progressive.history:
        return ()
    return tuple(
        ScoreSummary(
            kind=row["kind"],
            layer=row["block"],
            quantiles=tuple(row["quantiles"]),
            threshold=row["threshold"],
        )
        for row in progressive.history[-1]["scores"]
    )


def cut_records(progressive: Progressive, seconds: float | None) -> tuple[CutRecord, ...]:
    """Cuts in order.

    Args:
        progressive: with its history.
        seconds: duration of the run, for the share of time; None if unknown (a resumed run).
    """
    return tuple(
        CutRecord(
            step=entry["step"],
            before={kind: tuple(widths) for kind, widths in entry["widths_before"].items()},
            after={kind: tuple(widths) for kind, widths in entry["widths_after"].items()},
            params=int(entry["params_after"]["model"]),
            time_share=entry["seconds"] / seconds if seconds and "seconds" in entry else None,
            plan_hash=entry["plan"],
        )
        for entry in progressive.history
    )


def speed_pairs(result: SpeedResult, dense: Spec, now: Spec) -> tuple[SpeedPair, ...]:
    """Medians of a side-by-side measurement; the second model by the median ratio of rounds.

    Args:
        result: the measurement.
        dense: spec of the first model.
        now: spec of the second.

    Returns:
        Prefill by batch size, then decoding.
    """
    length = result.prompt_len
    flops = _prefill_flops(dense, length) / _prefill_flops(now, length)
    pairs = []
    for batch, rates in result.prefill_a.items():
        base = statistics.median(rates)
        pairs.append(
            SpeedPair(
                phase="prefill",
                batch=batch,
                dense=base,
                pruned=base * result.prefill_ratio[batch],
                rounds=_ratios(result.prefill_b[batch], rates),
                prompt=length,
                flops_ratio=flops,
            )
        )
    base = statistics.median(result.decode_a)
    decode = SpeedPair(
        phase="decode",
        batch=1,
        dense=base,
        pruned=base * result.decode_ratio,
        rounds=_ratios(result.decode_b, result.decode_a),
        prompt=result.decode_prompt,
        decoded=result.decode_tokens,
    )
    return (*pairs, decode)


def _prefill_flops(spec: Spec, length: int) -> float:
    """FLOPs of a prompt of some length; the output head works on its last token only."""
    token = count_flops(spec, context=length)
    return length * token.blocks + (token.model - token.blocks)


def _ratios(after: Sequence[float], before: Sequence[float]) -> tuple[float, ...]:
    return tuple(b / a for a, b in zip(before, after, strict=True))


def curves(loss: Sequence[Sequence[float]], val: Sequence[Sequence[float]]) -> tuple[Curve, ...]:
    """Training loss and validation perplexity over steps.

    Args:
        loss: [step, value] pairs.
        val: [step, value] pairs.
    """
    made = []
    for name, rows, quantity in (
        ("training", loss, "training loss"),
        ("validation", val, "validation perplexity"),
    ):
        if rows:
            steps, values = (
                tuple(int(step) for step, _ in rows),
                tuple(float(value) for _, value in rows),
            )
            made.append(Curve(name=name, step=steps, value=values, quantity=quantity))
    return tuple(made)


def asked_and_got(pruner: Any) -> tuple[str, str]:
    """Budget and result of a run in words.

    Args:
        pruner: the `Prune` callback.
    """
    budget, progressive = pruner.budget, pruner.progressive
    if budget is None or progressive is None:
        return "nothing", "the dense model"
    wanted = (
        [f"keep {100 * budget.keep:g} % of {budget.of} ({budget.base})"]
        if budget.keep is not None
        else []
    )
    wanted += [f"{kind} {width}" for kind, width in budget.widths.items()]
    now, dense = count_params(progressive.spec), count_params(progressive.dense)
    kept = ", ".join(
        f"{100 * now.of(base) / dense.of(base):.1f} % of {base}"
        for base in ("prunable", "non_embedding", "model")
    )
    return ", ".join(wanted), f"{kept} parameters left after {progressive.done} cuts"


def card(trainer: Trainer, base_model: str, pruner: Any, report: Any) -> dict[str, Any]:
    """Keyword arguments of `plprune.export_card.CardInfo` for a finished run.

    Args:
        trainer: of the run.
        base_model: directory or hub id of the dense model.
        pruner: the `Prune` callback, or None.
        report: the `plprune.report.Report` of the run, or None.
    """
    values: dict[str, Any] = {
        "base_model": base_model,
        "training": f"{trainer.global_step} optimizer steps",
        "seed": run_seed(),
    }
    if pruner is not None and pruner.progressive is not None:
        _, got = asked_and_got(pruner)
        history = pruner.progressive.history
        values |= {
            "method": pruner.method.label,
            "hyper": pruner.method.hyper(),
            "budget": pruner.budget.to_dict(),
            "got": {"parameters": got},
            "data_hash": history[-1]["calibration"] if history else "",
        }
    if report is not None:
        values["protocol"] = ", ".join(
            f"{key}: {value}"
            for key, value in report.protocol.items()
            if "." not in key and key != "config" and not isinstance(value, dict)
        )
        if report.perplexity:
            score = report.perplexity[0]
            values |= {
                "dataset": score.data,
                "perplexity": score.final,
                "dense_perplexity": score.dense,
            }
    return values


def perplexities(
    dense: dict[str, Any] | None, after: dict[str, Any] | None, *, trained: bool
) -> tuple[Score, ...]:
    """Perplexity before and after.

    Args:
        dense: what was measured of the dense model; None: nothing.
        after: of the pruned model; None: there is no validation text.
        trained: whether it was trained at all.
    """
    if dense is None or after is None:
        return ()
    value = after["perplexity"]
    name = str(after["protocol"]["source"])
    score = {"recovered": value} if trained else {"cut": value}
    return (Score(data=name, dense=dense["perplexity"], **score),)


def notes(dense: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What the report of a resumed run does not know.

    Args:
        dense: what was measured of the dense model; None: nothing.
        after: of the pruned model; None: there is no validation text.
    """
    found = ["The run was resumed; shares of time are not known."]
    if dense is None and after is not None:
        text = f"{after['perplexity']:.3f} on {after['protocol']['source']}"
        found.append(
            "The checkpoint holds no report, so the dense model was not measured; perplexity of "
            f"the pruned one: {text}."
        )
    return tuple(found)
