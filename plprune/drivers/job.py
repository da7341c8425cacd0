"""What to prune without training, by what, into which folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plprune.budget import Budget
from plprune.compensate import Compensation
from plprune.load_check import files_of
from plprune.methods.base import Method
from plprune.progress import Shown, unseen
from plprune.spec import Spec
from plprune.streaming.calls import Batch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do to which model."""

    folder: Path
    """The dense model."""
    target: Path
    """Where the export will be; the work lies beside it."""
    method: Method
    """Decides."""
    budget: Budget
    """How much stays."""
    compensation: Compensation | None = None
    """New weights for what reads from units that go."""
    batches: Sequence[Batch] = ()
    """Calibration batches of this process."""
    hidden_on_disk: bool = False
    """Keep hidden states in memory-mapped files instead of in memory."""
    dtype: torch.dtype = torch.float32
    """Number format of the weights while they compute."""
    device: str = "cpu"
    """Where they compute."""
    trust_remote_code: bool = False
    """Allow Python code of the folder to run."""
    shown: Shown = unseen
    """Shows progress."""


def settings(job: Job, dense: Spec, calibration: str) -> dict[str, Any]:
    """Everything the result depends on, as plain values.

    Args:
        job: what to do.
        dense: spec of the model.
        calibration: hash of the calibration sequences.
    """
    compensation = job.compensation
    return {
        "model": str(job.folder),
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime] for f in files_of(job.folder)},
        "fingerprint": dense.fingerprint,
        "method": job.method.label,
        "hyper": job.method.hyper(),
        "budget": job.budget.to_dict(),
        "compensation": None
        if compensation is None
        else {"class": type(compensation).__name__, **compensation.hyper()},
        "calibration": calibration,
        "dtype": str(job.dtype),
    }
