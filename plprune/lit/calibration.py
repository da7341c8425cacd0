"""Where calibration batches come from, and how their progress is shown."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Trainer

from plprune.drivers.whole import Batch, Progress
from plprune.errors import DataError

log = logging.getLogger(__name__)


def batches_of(
    trainer: Trainer, given: Iterable[Batch] | None, cut: int, *, fixed: bool
) -> Sequence[Batch]:
    """Calibration batches of one cut.

    Args:
        trainer: its data module may offer `calibration_batches(step, fixed)`.
        given: batches the user handed to the callback; they win.
        cut: number of the cut, seeds a fresh draw.
        fixed: the same batches at every cut.

    Returns:
        Batches with `input_ids` and, if there is padding, `attention_mask`.

    Raises:
        DataError: if there is neither, or the set is empty.
    """
    if given is not None:
        batches = list(given)
    elif has_source(trainer):
        # The whole set, equal everywhere; each rank runs its share and sums are reduced.
        whole = list(trainer.datamodule.calibration_batches(cut, fixed))  # type: ignore[attr-defined]
        batches = whole[trainer.global_rank :: trainer.world_size]
    else:
        batches = []
    if not batches or not all("input_ids" in batch for batch in batches):
        raise DataError(
            "no calibration batches",
            given=f"{len(batches)} batches from the "
            f"{'callback' if given is not None else 'data module'}",
            allowed="dicts with input_ids [B, T]",
            fix="use plprune.lit.data.LitTokens, or pass Statistics(batches=[...]) to Prune",
        )
    return batches


def has_source(trainer: Trainer) -> bool:
    """True if the data module offers calibration batches."""
    return hasattr(getattr(trainer, "datamodule", None), "calibration_batches")


def shown(trainer: Trainer, title: str) -> Progress:
    """Show the progress of a loop of known length: a bar in a terminal, plain lines in a log.

    Args:
        trainer: only rank 0 shows anything, and nothing with `enable_progress_bar: false` but log
            lines.
        title: what is going on.

    Returns:
        A function called with (done, total).
    """
    if not trainer.is_global_zero:
        return lambda done, total: None
    if sys.stderr.isatty() and trainer.progress_bar_callback is not None:
        return _bar(title)

    def line(done: int, total: int) -> None:
        # About ten lines a pass, whatever its length.
        if done == total or done % max(1, total // 10) == 0:
            log.info("%s: %d of %d batches", title, done, total)

    return line


def _bar(title: str) -> Progress:
    from rich.console import Console
    from rich.progress import Progress as Bar

    bar = Bar(console=Console(stderr=True), transient=True)
    task: Any = None

    def step(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(title, total=total)
        bar.update(task, completed=done)
        if done == total:
            bar.stop()

    return step
