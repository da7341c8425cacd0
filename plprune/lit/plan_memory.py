"""Memory of a planned run, on one device and on others, and what devices send each other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from plprune.allocate import sizes_of, units_per_group
from plprune.cuts import Cut
from plprune.errors import PlpruneError
from plprune.lit.progress import counted
from plprune.lit.run_length import accumulation, devices
from plprune.lit.run_parts import Run
from plprune.memory import Setup, Stages, estimate, statistics_bytes
from plprune.memory_phase import Phase
from plprune.memory_shared import shared, traffic
from plprune.methods.base import Method
from plprune.skeleton import shrink, store_block_inputs
from plprune.spec import Spec

_WORLDS = (8, 16, 64)
"""Numbers of devices a plan shows beside its own."""
_PATIENCE = 5.0
"""Seconds without a word."""
_HEAP = (
    "a CPU's C library may keep freed memory: with MALLOC_MMAP_THRESHOLD_=65536 in the environment "
    "peaks are as estimated, without it up to twice as high"
)
_DEVICE = (
    "not counted: the context of a GPU (about 0.5 GB), fragmentation of its allocator, buffers of "
    "the communication library"
)


def widths_of(spec: Spec, cut: Cut | None) -> dict[str, list[int]] | None:
    """Units per block after a cut, or before the first; None where they depend on data."""
    dense = {kind: units_per_group(spec, kind) for kind in spec.kinds()}
    if cut is None:
        return dense
    if not cut.budget.widths or not dense.keys() >= cut.budget.widths.keys():
        return None  # numbers of blocks say nothing of which
    stated = {
        kind: list(w) if isinstance(w, list) else [w] * len(spec.blocks)
        for kind, w in cut.budget.widths.items()
    }
    return dense | stated


def sizes_after(spec: Spec, cut: Cut | None, method: Method | None) -> dict[str, int] | None:
    """Units of axes after a cut; None where they depend on data.

    Args:
        spec: the dense model.
        cut: None for before the first.
        method: of the cut.
    """
    widths = widths_of(spec, cut)
    if widths is not None:
        return sizes_of(spec, widths)
    assert cut is not None, "the dense widths are known"
    return None if method is None else method.sizes_like(spec, cut.budget)


def memory_of(
    run: Run, model: nn.Module, spec: Spec, cuts: tuple[Cut, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Memory of a run.

    Args:
        run: its parts.
        model: dense, on the meta device.
        spec: its spec.
        cuts: planned.

    Returns:
        `memory`, phases of one device; `devices`, how they change with their number; and notes on
        why there are none, or what they leave out.
    """
    notes = [_DEVICE] if _on_gpu(run) or devices(run.trainer) > 1 else []
    notes += [] if _on_gpu(run) else [_HEAP]
    method = None if run.pruner is None else run.pruner.method
    known = [sizes for cut in cuts if (sizes := sizes_after(spec, cut, method)) is not None]
    if len(known) < len(cuts):
        notes.append("widths depend on data: memory after cuts is given at the dense size")
    if run.lora is not None and run.lora.start == "last_cut":
        notes.append("lora.start: last_cut: memory is that of the full training before it")
    if run.model.checkpointed:
        store_block_inputs(model)
    commits = _committed(run, len(cuts))
    small = [
        shrink(copy.deepcopy(model), known[n - 1]) if known else model
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
        taps = () if method is None else method.taps(spec)
        if any(tap.stat.backward for tap in taps):
            notes.append("the backward pass of the calibration set is not in the estimate")
        shown = counted("tracing the model for its memory", "passes", after=_PATIENCE)
        phases = estimate(stages, setup, statistics_bytes(spec, taps), shown)
    except PlpruneError:
        raise
    except Exception as error:  # a model may do in its forward what tensors without data cannot
        return {"memory": [], "devices": []}, [
            *notes,
            f"memory was not estimated: {type(error).__name__}: {error}",
        ]
    if not cuts:
        phases = tuple(p for p in phases if p.name in ("load", "train", "export"))
    moved = _offloaded(run)
    found = [_with_host(shared(phase, setup, model), moved) for phase in phases]
    return {"memory": found, "devices": _by_devices(phases, setup, model)}, notes


def _with_host(phase: Phase, moved: tuple[str, ...]) -> dict[str, Any]:
    """A phase; of what is offloaded also how much of it is on the host."""
    row = phase.to_dict()
    return {**row, "host": sum(row[part] for part in moved)} if moved else row


def _by_devices(phases: tuple[Phase, ...], setup: Setup, model: nn.Module) -> list[dict[str, Any]]:
    """Peak of every phase, and traffic, for other numbers of devices."""
    if setup.strategy == "single":
        return []
    whole = next(phase for phase in phases if phase.name == "train")
    rows = []
    for world in sorted({*_WORLDS, setup.world_size}):
        other = replace(setup, world_size=world)
        totals = {phase.name: shared(phase, other, model).total for phase in phases}
        gathered, reduced = traffic(whole, other)
        rows.append({"devices": world, **totals, "gathered": gathered, "reduced": reduced})
    return rows


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
        precision=_precision(run),
        accumulate=accumulation(run.trainer),
        lora=run.lora.config if trains_adapters else None,
        optimizer=run.model.optimizer_class,
        foreach=_on_gpu(run),
        strategy=run.strategy,
        world_size=devices(run.trainer),
    )


def _offloaded(run: Run) -> tuple[str, ...]:
    """Parts of a phase that ZeRO keeps on the host: gradients go where the optimizer is."""
    given = run.trainer.get("strategy", "auto")
    if isinstance(given, str):
        whole = given.lower().startswith("zero") and given.lower().endswith("_offload")
        return ("weights", "gradients", "optimizer") if whole else ()
    settings = dict(given.get("init_args") or {})
    config = settings.get("config")
    zero = dict(config.get("zero_optimization") or {}) if isinstance(config, dict) else {}
    state = settings.get("offload_optimizer") or "offload_optimizer" in zero
    weights = settings.get("offload_parameters") or "offload_param" in zero
    return ("weights",) * bool(weights) + ("gradients", "optimizer") * bool(state)


def _precision(run: Run) -> str:
    """As in Lightning; DeepSpeed's engine makes half weights of `mixed` too."""
    given = str(run.trainer.get("precision") or "32-true")
    return given.replace("-mixed", "-true") if run.strategy.startswith("zero") else given


def _on_gpu(run: Run) -> bool:
    accelerator = str(run.trainer.get("accelerator", "auto"))
    return accelerator in ("gpu", "cuda", "mps") or (
        accelerator == "auto" and torch.cuda.is_available()
    )
