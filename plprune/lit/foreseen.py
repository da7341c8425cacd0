"""What would stop an export after hours of training, seen before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from plprune.allocate import sizes_of
from plprune.count import count_params
from plprune.describe import describe
from plprune.errors import ExportError, PlpruneError
from plprune.export_config import Mode, target_for
from plprune.export_folder import require_space
from plprune.export_weights import is_tied, tensors_of
from plprune.lit import guard
from plprune.lora import any_adapter
from plprune.skeleton import config_of, shrink, skeleton

log = logging.getLogger(__name__)


def require_exportable(
    trainer: Trainer, model: nn.Module, directory: Path, mode: Mode, dtype: torch.dtype | None
) -> None:
    """Refuse a run whose result could not be written.

    Args:
        trainer: with its callbacks set up.
        model: plain Hugging Face model, before the first cut of this run.
        directory: target of the export.
        mode: of the export.
        dtype: number format of the export; None: the model's.

    Raises:
        ExportError: saying what stands in the way.
    """
    _require_known_adapters(trainer, model)
    widths = _final_widths(trainer)
    if mode == "plain" and widths is not None:
        _require_stock_class(trainer, model, widths)
    _require_space(trainer, model, directory, dtype, widths)


def _require_known_adapters(trainer: Trainer, model: nn.Module) -> None:
    """Adapters of the user's own are merged by nobody."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    known = (getattr(callback, "injected", None) for callback in callbacks)
    if any_adapter(model) and not any(one is not None and one.model is model for one in known):
        raise ExportError(
            "nobody will merge the adapters of this model before it is exported",
            given="a model that has LoRA adapters already",
            allowed="adapters of plprune.callbacks.LoRARecovery, or none",
            fix="let LoRARecovery inject them, or leave ExportHF out, merge them after the fit and "
            "call plprune.export.save_hf",
        )


def _final_widths(trainer: Trainer) -> Mapping[str, list[int]] | None:
    """Widths at the end, if the budget alone says."""
    pruner = guard.pruner_of(trainer)
    if pruner is None or pruner.budget is None:
        return None
    found: Mapping[str, list[int]] | None = pruner.method.widths(
        pruner.progressive.dense, pruner.budget
    )
    return found


def _require_stock_class(
    trainer: Trainer, model: nn.Module, widths: Mapping[str, list[int]]
) -> None:
    uneven = next((kind for kind, blocks in widths.items() if len(set(blocks)) > 1), None)
    if uneven is not None:
        raise ExportError(
            "no stock class can hold layers of different widths",
            given=f"export.mode: plain, and {uneven} widths {widths[uneven]}",
            allowed="equal widths in all layers",
            fix="set export.mode: auto, or one width in budget.widths",
        )
    pruner, config = guard.pruner_of(trainer), getattr(model, "config", None)
    if config is None or pruner.progressive.done:
        return
    dense = pruner.progressive.dense
    small = shrink(skeleton(config, trust_remote_code=True), sizes_of(dense, widths))
    tensors = tensors_of(small, dtype=None, elsewhere=True)
    target_for(small, describe(small), tensors, mode="plain", tied=is_tied(small))


def _require_space(
    trainer: Trainer,
    model: nn.Module,
    directory: Path,
    dtype: torch.dtype | None,
    widths: Mapping[str, list[int]] | None,
) -> None:
    """Refuse a disk that is too full already now; it may fill up later still."""
    pruner = guard.pruner_of(trainer)
    if pruner is None or widths is None:
        return
    dense = pruner.progressive.dense
    number = count_params(dense, sizes_of(dense, widths)).model
    stored: Any = dtype or next(model.parameters()).dtype
    parent = next(p for p in directory.absolute().parents if p.exists())
    require_space(parent, int(number) * stored.itemsize)


def warn_wider(model: nn.Module, dtype: torch.dtype | None, *, trust_remote_code: bool) -> None:
    """Say before training that the export will hold wider numbers than the base model's files.

    A pruned model would then be larger on disk than the one it came from.

    Args:
        model: plain Hugging Face model.
        dtype: number format the user chose for the export; None: the model's.
        trust_remote_code: whether code of the base's folder may run.
    """
    base = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if dtype is not None or not base:
        return
    try:
        stored = getattr(config_of(base, trust_remote_code=trust_remote_code), "dtype", None)
    except PlpruneError:  # a base that is not here any more: nothing to compare
        return
    own = next(model.parameters()).dtype
    if isinstance(stored, torch.dtype) and own.itemsize > stored.itemsize:
        formats = [str(one).removeprefix("torch.") for one in (own, stored)]
        log.warning(
            "the export will hold %s, the files of the base model %s: set export.dtype: %s "
            "(ExportHF(..., dtype=%r)) to write no wider numbers than they have",
            *formats,
            formats[1],
            formats[1],
        )
