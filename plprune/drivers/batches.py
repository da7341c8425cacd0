"""Calibration batches: which tokens count, and what identifies the set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from plprune import dist
from plprune.errors import DataError

Batch = Mapping[str, Tensor]
INPUTS = ("input_ids", "attention_mask")
"""What a model is given of a batch."""


def token_mask(inputs: Batch, skip_first: int) -> Tensor | None:
    """Tokens that count.

    Args:
        inputs: a batch.
        skip_first: tokens at the start of each sequence to leave out, padding not counted.

    Returns:
        [B, T] bool, or None if all count.
    """
    mask = inputs.get("attention_mask")
    if mask is None and skip_first == 0:
        return None
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return keep & (keep.cumsum(-1) > skip_first)


def empty_calibration() -> DataError:
    """What to say when there is nothing to look at."""
    return DataError(
        "empty calibration set",
        given="0 batches",
        allowed="at least 1",
        fix="set data.calibration_samples",
    )


def calibration_hash(batches: Iterable[Batch]) -> str:
    """Hash of the calibration sequences of all ranks; collective.

    Args:
        batches: this rank's.

    Returns:
        64 hex digits that depend neither on batches, padding and order nor on the number of ranks.
    """
    digest = torch.zeros(4, dtype=torch.int64)
    for batch in batches:
        digest += _digest(batch)
    return dist.summed(digest).numpy().tobytes().hex()


def some(batches: Sequence[Batch], count: int | None) -> list[Batch]:
    """A part of the calibration set, the same however it is spread over batches and ranks.

    Args:
        batches: this rank's.
        count: of sequences on all ranks, those whose hashes are lowest; None: all.

    Returns:
        This rank's part in batches; there may be none. Of sequences with equal content all or none
        are in it, so that it may hold some more.
    """
    if count is None:
        return list(batches)
    digests = [_digests(batch)[:, 0] for batch in batches]
    every = dist.joined(torch.cat([torch.zeros(0, dtype=torch.int64), *digests]))
    if len(every) <= count:
        return list(batches)
    limit = every.sort().values[count - 1]
    part: list[Batch] = []
    for batch, digest in zip(batches, digests, strict=True):
        rows = torch.nonzero(digest <= limit)[:, 0]
        if len(rows):
            part.append({k: v[rows.to(v.device)] for k, v in batch.items() if k in INPUTS})
    return part


def _digest(batch: Batch) -> Tensor:
    """[4] int64, sum over sequences of their sha256, padding left out; it wraps around."""
    return _digests(batch).sum(0)


def _digests(batch: Batch) -> Tensor:
    """[B, 4] int64 sha256 of every sequence, padding left out."""
    ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    rows = []
    for row, keep in zip(ids, kept, strict=True):
        sequence = hashlib.sha256(row[keep].to(torch.int64).numpy().tobytes()).digest()
        rows.append(torch.frombuffer(bytearray(sequence), dtype=torch.int64))
    return torch.stack(rows)
