"""Where calibration batches come from, and which of them a process works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from plprune.drivers.batches import Batch
from plprune.errors import DataError
from plprune.lit import guard
from plprune.unwrap import unwrap

_READ = ("input_ids", "attention_mask")
"""What the model is given of a batch."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process runs of a calibration set."""

    batches: Sequence[Batch]
    """Batches it looks at."""
    idle: Sequence[Batch]
    """Batches to run without looking, so that all processes make equally many passes."""
    probe: Batch
    """One row, equal on every process."""


def share_of(trainer: Trainer, given: Iterable[Batch] | None, cut: int, *, fixed: bool) -> Share:
    """Calibration batches of one cut.

    Args:
        trainer: its data module may offer `calibration_batches(step, fixed)`.
        given: batches the user handed to the callback, equal on every process; they win.
        cut: number of the cut, seeds a fresh draw.
        fixed: the same batches at every cut.

    Returns:
        Batches with `input_ids` and, if there is padding, `attention_mask`: the whole set on one
        process, otherwise every n-th; sums are reduced later.

    Raises:
        DataError: if there is neither, the set is empty, or the model cannot read a batch.
    """
    if given is not None:
        whole = list(given)
    elif has_source(trainer):
        whole = list(trainer.datamodule.calibration_batches(cut, fixed))  # type: ignore[attr-defined]
    else:
        whole = []
    origin = "data module" if given is None else "callback"
    require_usable(whole, origin, _vocabulary(trainer))
    rank, world = rank_and_world(trainer)
    mine = whole[rank::world]
    missing = -(-len(whole) // world) - len(mine)
    probe = {key: whole[0][key][:1] for key in _READ if key in whole[0]}
    return Share(batches=mine, idle=whole[:1] * missing, probe=probe)


def require_usable(batches: Sequence[Any], origin: str, vocabulary: int | None = None) -> None:
    """Refuse calibration batches that a model cannot read, before the first pass.

    Args:
        batches: of all processes.
        origin: who gave them, for the message.
        vocabulary: token ids of the model; None if it is not known yet.

    Raises:
        DataError: if there are none, or naming the first that cannot be used.
    """
    if not batches:
        raise DataError(
            "no calibration batches",
            given=f"0 batches from the {origin}",
            allowed="dicts with input_ids [B, T]",
            fix="use plprune.lit.data.LitTokens, or "
            "Prune(..., statistics=Statistics(batches=[...]))",
        )
    for number, batch in enumerate(batches):
        problem = _problem(batch, vocabulary)
        if problem:
            below = "" if vocabulary is None else f" below {vocabulary}"
            raise DataError(
                "a calibration batch cannot be used",
                given=f"batch {number} of the {origin} with {problem}",
                allowed=f"dicts with input_ids [B, T], int64 token ids{below}, and, if there is "
                "padding, attention_mask [B, T]",
                fix="use the tokenizer of the model: "
                "{'input_ids': tokenizer(text, return_tensors='pt').input_ids}",
            )


def _problem(batch: Any, vocabulary: int | None) -> str:
    """What is wrong with a batch; nothing if it can be used."""
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__} instead of a dict"
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor):
        return "no input_ids" if ids is None else f"input_ids of type {type(ids).__name__}"
    if ids.ndim != 2 or ids.numel() == 0:
        return f"input_ids of shape {list(ids.shape)}"
    if ids.shape[1] < 2:
        return f"input_ids of shape {list(ids.shape)}: a loss needs two tokens"
    if ids.dtype not in (torch.int64, torch.int32):
        return f"input_ids of {ids.dtype}"
    if "attention_mask" in batch and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return f"input_ids of shape {list(ids.shape)} and attention_mask of {shape}"
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        return f"token ids {low}..{high}"
    return ""


def _vocabulary(trainer: Trainer) -> int | None:
    """Token ids of the model that is pruned, if its config says."""
    progressive = guard.progressive_of(trainer)
    if progressive is None:
        return None
    size = getattr(getattr(unwrap(progressive.model), "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def rank_and_world(trainer: Trainer) -> tuple[int, int]:
    """Number of this process among those that share data, and how many there are.

    Args:
        trainer: with its strategy set up.

    Returns:
        Rank and number of ranks.
    """
    share = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return int(share["rank"]), int(share["num_replicas"])


def has_source(trainer: Trainer) -> bool:
    """True if the data module offers calibration batches."""
    data = getattr(trainer, "datamodule", None)
    return hasattr(data, "calibration_batches") and getattr(data, "calibrates", True)
