"""What a run would do, as plain values: length, schedule, sizes, memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from plprune import cuts as planned
from plprune.allocate import units_per_group
from plprune.budget import Budget
from plprune.count import count_flops, count_params, kv_cache_bytes, price
from plprune.cuts import Cut
from plprune.lit import preflight
from plprune.lit.plan_memory import memory_of, sizes_after, widths_of
from plprune.lit.run_length import devices, run_length
from plprune.lit.run_parts import Run
from plprune.lit.tables import span
from plprune.schedule import Length, Phase, TransActRamp
from plprune.spec import Spec


def facts(run: Run) -> dict[str, Any]:
    """Plan a run.

    Args:
        run: its parts.

    Returns:
        JSON-able: run, dense, cuts, recovery, budget_base, widths, memory, devices, notes.
    """
    model, spec = preflight.described(run)
    preflight.require_parts(run, model, spec)  # before any text is read
    length = run_length(run.trainer, run.data, None if run.pruner is None else run.pruner.schedule)
    cuts = preflight.planned_cuts(run, spec, length)
    budget = None if run.pruner is None else run.pruner.budget
    rows = [_row(run, spec, cut, str(n)) for n, cut in enumerate((None, *cuts))]
    rows[0]["name"] = "dense"
    stretches = _stretches(rows, _phases(run, length), length)
    for row in (*rows, *stretches):
        row["tokens"] = row["steps"] * run.tokens_per_step
        if run.model.rate.per_phase and row["steps"]:
            row["peak_learning_rate"] = run.model.rate.peak * row.pop("peak")
        else:
            row.pop("peak", None)
    memory, notes = memory_of(run, model, spec, cuts)
    return {
        "run": _about(run, model, spec, length),
        "dense": rows[0],
        "cuts": rows[1:],
        "recovery": stretches,
        "budget_base": "-" if budget is None else f"{budget.of}, {budget.base}",
        "widths": _final(spec, rows[-1]),
        **memory,
        "notes": [*_notes(run, spec, cuts), *notes],
    }


def _phases(run: Run, length: Length) -> tuple[Phase, ...]:
    if run.pruner is None:
        return (Phase(start=0, steps=length.steps, peak=1.0),)
    found: tuple[Phase, ...] = run.pruner.schedule.phases(length)
    return found


def _row(run: Run, spec: Spec, cut: Cut | None, name: str) -> dict[str, Any]:
    """Sizes after a cut; None where they depend on data that nobody has seen yet."""
    budget, method = (None, None) if run.pruner is None else (run.pruner.budget, run.pruner.method)
    row: dict[str, Any] = {
        "name": name,
        "step": 0 if cut is None else cut.step,
        "peak_learning_rate": None,
    }
    sizes = sizes_after(spec, cut, method)
    if sizes is None:
        assert cut is not None, "the dense sizes are known"
        unknown = dict.fromkeys(("widths", "params", "flops_per_token", "kv_cache_bytes_per_token"))
        return row | unknown | {"kept": cut.budget.keep}
    context = 2048 if budget is None else budget.context
    params = count_params(spec, sizes)
    dense = 1.0 if budget is None else float(price(spec, budget))
    now = 1.0 if budget is None else float(price(spec, budget, sizes))
    return row | {
        "widths": widths_of(spec, cut),
        "params": {base: int(count) for base, count in params.to_dict().items()},
        "kept": now / dense,
        "flops_per_token": int(count_flops(spec, sizes, context=context).model),
        "kv_cache_bytes_per_token": int(kv_cache_bytes(spec, sizes)),
    }


def _stretches(
    rows: list[dict[str, Any]], phases: tuple[Phase, ...], length: Length
) -> list[dict[str, Any]]:
    """Fill in the training after each row; a phase that begins without a cut gets a row."""
    rows[0]["steps"] = 0
    cut_steps = {row["step"] for row in rows}
    starts = sorted({*cut_steps, *(phase.start for phase in phases)})
    more = []
    for start, end in zip(starts, [*starts[1:], length.steps], strict=True):
        # Several rows share a step only at 0: the dense one and a cut before the first step.
        row = next((row for row in reversed(rows) if row["step"] == start), None)
        if row is None:
            row = {"name": "recovery", "step": start, "widths": rows[-1]["widths"]}
            row["peak_learning_rate"] = None
            more.append(row)
        row["steps"] = end - start
        row["peak"] = next(p.peak for p in reversed(phases) if p.start <= start)
    return more


def _final(spec: Spec, last: dict[str, Any]) -> dict[str, Any]:
    if last["widths"] is None:
        return {}
    return {
        kind: {"dense": units_per_group(spec, kind), "kept": list(kept)}
        for kind, kept in last["widths"].items()
    }


def _notes(run: Run, spec: Spec, cuts: tuple[Cut, ...]) -> list[str]:
    if run.pruner is None:
        return []
    notes = []
    plan = run.pruner.schedule
    if isinstance(plan, TransActRamp) and plan.tokens_per_step != run.tokens_per_step:
        notes.append(
            f"prune.schedule.tokens_per_step is {plan.tokens_per_step}, a step of this run has "
            f"{run.tokens_per_step} tokens: cuts come after other numbers of tokens than stated"
        )
    if note := planned.missed(spec, run.pruner.budget, cuts):
        notes.append(note)
    return notes


def _words(budget: Budget) -> str:
    kept = [] if budget.keep is None else [f"keep {budget.keep:g} of {budget.of} ({budget.base})"]
    return ", ".join([*kept, *(f"{kind} {span(w)}" for kind, w in budget.widths.items())])


def _about(run: Run, model: nn.Module, spec: Spec, length: Length) -> dict[str, Any]:
    pruner = run.pruner
    lora = None if run.lora is None else f"from {run.lora.start}, {run.lora.config or 'defaults'}"
    return {
        "model": run.model.pretrained,
        "model_class": type(model).__name__,
        "layers": len(spec.blocks),
        "method": "none" if pruner is None else pruner.method.label,
        "budget": None if pruner is None else _words(pruner.budget),
        "commit": None if pruner is None else pruner.commit,
        "optimizer_state": None if pruner is None else pruner.optimizer_state,
        "steps": length.steps,
        "tokens_per_step": run.tokens_per_step,
        "tokens": length.steps * run.tokens_per_step,
        "precision": str(run.trainer.get("precision") or "32-true"),
        "weights_as_loaded": run.model.dtype_name,
        "lora": lora,
        "gradient_checkpointing": run.model.checkpointed,
        "devices": devices(run.trainer),
    }
