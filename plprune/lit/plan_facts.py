"""What a run would do, as plain values: length, schedule, sizes, memory."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plprune import cuts as planned
from plprune.allocate import sizes_of, units_per_group
from plprune.budget import Budget
from plprune.count import count_flops, count_params, kv_cache_bytes, price
from plprune.cuts import Cut
from plprune.describe import describe
from plprune.errors import PlpruneError
from plprune.lit.run_length import accumulation, devices, run_length
from plprune.lit.tables import span
from plprune.memory import Setup, Stages, estimate, statistics_bytes
from plprune.schedule import Length, Phase, TransActRamp
from plprune.skeleton import config_of, shrink, skeleton, store_block_inputs
from plprune.spec import Spec

_HEAP = (
    "a CPU's C library may keep freed memory: with MALLOC_MMAP_THRESHOLD_=65536 in the environment "
    "peaks are as estimated, without it up to twice as high"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run."""

    model: Any
    """`LitCausalLM`, nothing loaded."""
    data: Any
    """`LitTokens`, nothing read."""
    trainer: Any
    """Arguments of the trainer, by name."""
    pruner: Any = None
    """`Prune` with a method, or None."""
    lora: Any = None
    """`LoRARecovery`, or None."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on all devices."""
        batch = self.data.batch_size * self.data.corpus.seq_len
        return int(batch * accumulation(self.trainer) * devices(self.trainer))


def facts(run: Run) -> dict[str, Any]:
    """Plan a run.

    Args:
        run: its parts.

    Returns:
        JSON-able: run, dense, cuts, recovery, budget_base, widths, memory, notes.
    """
    config = config_of(run.model.pretrained, trust_remote_code=run.model.trust_remote_code)
    name = run.model.dtype_name
    model = skeleton(
        config,
        dtype=None if name == "auto" else getattr(torch, name),
        attn_implementation=run.model.attn_implementation,
        trust_remote_code=run.model.trust_remote_code,
    )
    spec = describe(model)
    if run.pruner is not None:  # a budget that cannot be met is refused before any text is read
        run.pruner.method.widths(spec, run.pruner.budget)
    length = run_length(run.trainer, run.data, None if run.pruner is None else run.pruner.schedule)
    cuts = _cuts(run, spec, length)
    budget = None if run.pruner is None else run.pruner.budget
    rows = [_row(spec, cut, budget, str(n)) for n, cut in enumerate((None, *cuts))]
    rows[0]["name"] = "dense"
    stretches = _stretches(rows, _phases(run, length), length)
    for row in (*rows, *stretches):
        row["tokens"] = row["steps"] * run.tokens_per_step
        if run.model.rate.per_phase and row["steps"]:
            row["peak_learning_rate"] = run.model.rate.peak * row.pop("peak")
        else:
            row.pop("peak", None)
    memory, notes = _memory(run, model, spec, cuts)
    return {
        "run": _about(run, model, spec, length),
        "dense": rows[0],
        "cuts": rows[1:],
        "recovery": stretches,
        "budget_base": "-" if budget is None else f"{budget.of}, {budget.base}",
        "widths": _final(spec, rows[-1]),
        "memory": memory,
        "notes": [*_notes(run), *notes],
    }


def _cuts(run: Run, spec: Spec, length: Length) -> tuple[Cut, ...]:
    if run.pruner is None:
        return ()
    return planned.cuts(spec, run.pruner.method, run.pruner.budget, run.pruner.schedule, length)


def _phases(run: Run, length: Length) -> tuple[Phase, ...]:
    if run.pruner is None:
        return (Phase(start=0, steps=length.steps, peak=1.0),)
    found: tuple[Phase, ...] = run.pruner.schedule.phases(length)
    return found


def _row(spec: Spec, cut: Cut | None, budget: Budget | None, name: str) -> dict[str, Any]:
    """Sizes after a cut; None where they depend on data that nobody has seen yet."""
    row: dict[str, Any] = {
        "name": name,
        "step": 0 if cut is None else cut.step,
        "peak_learning_rate": None,
    }
    widths = _widths(spec, cut)
    if widths is None:
        assert cut is not None, "the dense widths are known"
        unknown = dict.fromkeys(("widths", "params", "flops_per_token", "kv_cache_bytes_per_token"))
        return row | unknown | {"kept": cut.budget.keep}
    sizes = sizes_of(spec, widths)
    context = 2048 if budget is None else budget.context
    params = count_params(spec, sizes)
    dense = 1.0 if budget is None else float(price(spec, budget))
    now = 1.0 if budget is None else float(price(spec, budget, sizes))
    return row | {
        "widths": widths,
        "params": {base: int(count) for base, count in params.to_dict().items()},
        "kept": now / dense,
        "flops_per_token": int(count_flops(spec, sizes, context=context).model),
        "kv_cache_bytes_per_token": int(kv_cache_bytes(spec, sizes)),
    }


def _widths(spec: Spec, cut: Cut | None) -> dict[str, list[int]] | None:
    dense = {kind: units_per_group(spec, kind) for kind in spec.kinds()}
    if cut is None:
        return dense
    if not cut.budget.widths:
        return None
    stated = {
        kind: list(w) if isinstance(w, list) else [w] * len(spec.blocks)
        for kind, w in cut.budget.widths.items()
    }
    return dense | stated


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


def _memory(
    run: Run, model: nn.Module, spec: Spec, cuts: tuple[Cut, ...]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Phases, and why there are none or what they leave out."""
    notes = [_HEAP] if not _on_gpu(run) else []
    known = [widths for cut in cuts if (widths := _widths(spec, cut)) is not None]
    if len(known) < len(cuts):
        notes.append("widths depend on data: memory after cuts is given at the dense size")
    if run.lora is not None and run.lora.start == "last_cut":
        notes.append("lora.start: last_cut: memory is that of the full training before it")
    if run.model.checkpointed:
        store_block_inputs(model)
    commits = _committed(run, len(cuts))
    small = [
        shrink(copy.deepcopy(model), sizes_of(spec, known[n - 1])) if known else model
        for n in dict.fromkeys(commits)
    ]
    stages = Stages(
        dense=model,
        first=small[0] if small else model,
        last=small[-1] if small else model,
        at_start=bool(cuts) and cuts[commits[0] - 1].step == 0,
    )
    try:
        setup = _setup(run)
        taps = () if run.pruner is None else run.pruner.method.taps(spec)
        phases = estimate(stages, setup, statistics_bytes(spec, taps))
    except PlpruneError:
        raise
    except Exception as error:  # a model may do in its forward what tensors without data cannot
        return [], [*notes, f"memory was not estimated: {type(error).__name__}: {error}"]
    if not cuts:
        phases = tuple(p for p in phases if p.name in ("load", "train", "export"))
    return [phase.to_dict() for phase in phases], notes


def _committed(run: Run, cuts: int) -> list[int]:
    """Numbers of the first and the last cut that make tensors smaller."""
    if cuts == 0:
        return []
    every = run.pruner.commit
    first = 1 if every == "every" else cuts if every == "last" else min(int(every), cuts)
    return [first, cuts]


def _setup(run: Run) -> Setup:
    observed = run.pruner is not None and run.pruner.statistics.source != "training"
    trains_adapters = run.lora is not None and run.lora.start == "fit"
    return Setup(
        batch_size=run.data.batch_size,
        seq_len=run.data.corpus.seq_len,
        calibration=(run.data.batch_size if observed else 0, run.data.corpus.calibration_seq_len),
        precision=str(run.trainer.get("precision") or "32-true"),
        accumulate=accumulation(run.trainer),
        lora=run.lora.config if trains_adapters else None,
        optimizer=run.model.optimizer_class,
        foreach=_on_gpu(run),
        strategy=_strategy(run),
        world_size=devices(run.trainer),
    )


def _on_gpu(run: Run) -> bool:
    accelerator = str(run.trainer.get("accelerator", "auto"))
    return accelerator in ("gpu", "cuda", "mps") or (
        accelerator == "auto" and torch.cuda.is_available()
    )


def _strategy(run: Run) -> str:
    """Its name in `plprune.memory_shared.SHARDED`; a strategy that is not known shares nothing."""
    given = run.trainer.get("strategy", "auto")
    text = str(given if isinstance(given, str) else given.get("class_path", "")).lower()
    if re.fullmatch("zero[123]", text):
        return text
    if "deepspeed" in text:
        stage = 2 if isinstance(given, str) else (given.get("init_args") or {}).get("stage", 2)
        return f"zero{text[text.rfind('stage_') + 6]}" if "stage_" in text else f"zero{stage}"
    if "fsdp" in text or "modelparallel" in text:
        return "fsdp"
    return "single" if devices(run.trainer) == 1 else "ddp"


def _notes(run: Run) -> list[str]:
    notes = []
    plan = None if run.pruner is None else run.pruner.schedule
    if isinstance(plan, TransActRamp) and plan.tokens_per_step != run.tokens_per_step:
        notes.append(
            f"prune.schedule.tokens_per_step is {plan.tokens_per_step}, a step of this run has "
            f"{run.tokens_per_step} tokens: cuts come after other numbers of tokens than stated"
        )
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
