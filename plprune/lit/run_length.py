"""How long a run will be, from its configuration alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from lightning.pytorch import Trainer

from plprune.errors import ConfigError
from plprune.lit import guard
from plprune.schedule import Length, Schedule
from plprune.text import source_kind

_DEFAULT_EPOCHS = 1000  # Lightning's, when neither steps nor epochs nor time are given


def run_length(trainer: Any, data: Any, schedule: Schedule | None) -> Length:
    """Optimizer steps of a run and of an epoch.

    The training text is read only if the number of steps follows from it, or the schedule counts
    epochs.

    Args:
        trainer: arguments of the trainer, by name.
        data: `LitTokens`.
        schedule: of the cuts; None without cuts.

    Returns:
        The length.

    Raises:
        ConfigError: if the run has no end, or its length would have to be read from a hub.
    """
    steps, epochs = limits(trainer)
    batches: float = _batches(trainer, data) if reads_text(trainer, schedule) else math.inf
    estimated: float = math.inf if steps == -1 else steps
    if epochs >= 0:
        per_epoch = math.ceil(batches / accumulation(trainer))
        estimated = min(per_epoch * max(epochs, 1), estimated)
    stub = SimpleNamespace(
        estimated_stepping_batches=estimated,
        num_training_batches=batches,
        accumulate_grad_batches=accumulation(trainer),
    )
    return guard.length_of(cast(Trainer, stub))


def accumulation(trainer: Any) -> int:
    """Batches of one optimizer step."""
    return int(trainer.get("accumulate_grad_batches") or 1)


def devices(trainer: Any) -> int:
    """Processes of a run; 1 where the number is left to the machine."""
    given = trainer.get("devices", "auto")
    if isinstance(given, (list, tuple)):
        count = len(given)
    else:
        text = str(given)
        count = int(text) if text.isdigit() and int(text) > 0 else 1
    return count * int(trainer.get("num_nodes") or 1)


def reads_text(trainer: Any, schedule: Schedule | None) -> bool:
    """Whether the length of a run, or its cuts, follow from the size of its training text."""
    return limits(trainer)[1] >= 0 or getattr(schedule, "unit", None) == "epoch"


def limits(trainer: Any) -> tuple[int, int]:
    """max_steps and max_epochs as Lightning understands them; -1 is no limit."""
    quick = trainer.get("fast_dev_run")
    if quick:
        return int(quick), 1
    steps = trainer.get("max_steps")
    steps = -1 if steps is None else int(steps)
    epochs = trainer.get("max_epochs")
    if epochs is None:
        timed = trainer.get("max_time") is not None
        epochs = _DEFAULT_EPOCHS if steps == -1 and not timed else -1
    return steps, int(epochs)


def _batches(trainer: Any, data: Any) -> int:
    """Training batches of one epoch on one process; reads and tokenises local text."""
    if trainer.get("fast_dev_run"):
        return int(trainer.get("fast_dev_run"))
    corpus = data.corpus
    remote = [name for name in corpus.sources() if source_kind(name) == "hub"]
    if not Path(corpus.tokenizer).expanduser().is_dir():
        remote.append(corpus.tokenizer)
    if remote:
        raise ConfigError(
            "the length of the run is not known without reading from a hub",
            given=f"{remote[0]}, and no trainer.max_steps",
            allowed="local text and tokenizer, or a number of steps",
            fix="set trainer.max_steps (and leave trainer.max_epochs unset)",
        )
    blocks = len(data.training().blocks)
    batches: int = blocks // (data.batch_size * devices(trainer))
    limit = trainer.get("limit_train_batches")
    if limit is None:
        return batches
    return int(min(batches, limit) if isinstance(limit, int) else batches * limit)
