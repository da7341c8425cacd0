"""From a finished run to the values a report and a model card print."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Trainer

from plprune.count import Tally
from plprune.drivers.progressive import Progressive
from plprune.plots import Curve, LayerWidths, ScoreSummary
from plprune.report import CutRecord, SizePair, SpeedPair
from plprune.timing import SpeedResult

LIBRARIES = ("plprune", "torch", "transformers", "lightning", "peft")
"""Packages whose versions a protocol names."""


def versions() -> str:
    """Versions of the libraries that matter, in one line."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    )


def protocol(
    trainer: Trainer, progressive: Progressive | None, result: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a run was measured, as plain values.

    Args:
        trainer: with its data module.
        progressive: pruning state, or None for a dense run.
        result: `to_dict` of the last perplexity, or None if none was measured.

    Returns:
        Keys of `report_html.PROTOCOL` and, if the data module can describe itself, what it says.
    """
    data: Any = getattr(trainer, "datamodule", None)
    described = data.describe() if hasattr(data, "describe") else {}
    measured = (result or {}).get("protocol", {})
    values: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "data": _text(measured.get("source")) + _hash(measured.get("text_sha256")),
        "windows": measured.get("windows"),
        "length": measured.get("seq_len"),
        "dtype": measured.get("dtype"),
        "seed": described.get("seed"),
        "tokenizer": described.get("tokenizer"),
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "optimizer_steps": trainer.global_step,
        "versions": versions(),
        "plan_hashes": ", ".join(entry["plan"] for entry in progressive.history)
        if progressive
        else "none",
        "command": " ".join(["plprune", *sys.argv[1:]]) if len(sys.argv) > 1 else "a Python script",
    }
    for key, value in described.items():
        values.setdefault(
            f"data.{key}",
            value if isinstance(value, (str, int, float)) or value is None else str(value),
        )
    return {key: value for key, value in values.items() if value is not None}


def _text(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _hash(value: object) -> str:
    return "" if value is None else f" (sha256 {str(value)[:16]})"


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
    pairs["bytes"] = SizePair(dense=dense.bytes, pruned=now.bytes)
    pairs["flops_per_token"] = SizePair(
        dense=dense.flops.model, pruned=now.flops.model, note=f"at {now.context} tokens of context"
    )
    pairs["kv_cache_bytes_per_token"] = SizePair(
        dense=dense.kv_cache, pruned=now.kv_cache, note="bfloat16"
    )
    return pairs


def layers(progressive: Progressive) -> tuple[LayerWidths, ...]:
    """Widths of every layer, dense and kept."""
    dense, kept = progressive.dense, progressive.spec
    kinds = [kind for kind in dense.kinds() if kind != "query_in_group"]
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


def speed_pairs(result: SpeedResult) -> tuple[SpeedPair, ...]:
    """Medians of a side-by-side measurement; the second model by the median ratio of rounds."""
    pairs = []
    for batch, dense in result.prefill_a.items():
        base = _median(dense)
        pairs.append(
            SpeedPair(
                phase="prefill", batch=batch, dense=base, pruned=base * result.prefill_ratio[batch]
            )
        )
    base = _median(result.decode_a)
    pairs.append(SpeedPair(phase="decode", batch=1, dense=base, pruned=base * result.decode_ratio))
    return tuple(pairs)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


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
    from plprune.count import count_params

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
    }
    if pruner is not None and pruner.progressive is not None:
        _, got = asked_and_got(pruner)
        history = pruner.progressive.history
        values |= {
            "method": type(pruner.method).__name__,
            "hyper": pruner.method.hyper(),
            "budget": pruner.budget.to_dict(),
            "got": {"parameters": got},
            "data_hash": history[-1]["calibration"] if history else "",
        }
    if report is not None:
        values["protocol"] = ", ".join(
            f"{key}: {value}" for key, value in report.protocol.items() if "." not in key
        )
        seed = report.protocol.get("seed")
        values["seed"] = seed if isinstance(seed, int) else None
        if report.perplexity:
            score = report.perplexity[0]
            values |= {
                "dataset": score.data,
                "perplexity": score.final,
                "dense_perplexity": score.dense,
            }
    return values
