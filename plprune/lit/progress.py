"""How long work is shown: bars in a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from plprune.progress import Progress, silent

log = logging.getLogger("plprune")


def shown(trainer: Trainer, title: str, unit: str = "batches") -> Progress:
    """Show a loop of known length inside a run.

    Args:
        trainer: only rank 0 shows anything, and nothing with `enable_progress_bar: false` but log
            lines.
        title: what is going on.
        unit: what is counted.

    Returns:
        A function called with (done, total).
    """
    if not trainer.is_global_zero:
        return silent
    return counted(title, unit, bar=trainer.progress_bar_callback is not None)


def counted(
    title: str, unit: str, *, bar: bool = True, eta: bool = False, after: float = 0.0
) -> Progress:
    """Show a loop of known length: a bar if stderr is a terminal, else about ten lines.

    Args:
        title: what is going on.
        unit: what is counted.
        bar: False: lines also in a terminal.
        eta: lines say how long it will take still; bars always do.
        after: seconds in which nothing is shown: what ends before is not worth a line.

    Returns:
        A function called with (done, total).
    """
    began = time.monotonic()
    if bar and sys.stderr.isatty():
        return _patient(_bar(title), began + after)

    first: int | None = None

    def line(done: int, total: int) -> None:
        nonlocal first
        first = done - 1 if first is None else first  # a rerun does not begin with the first
        if done == total or done % max(1, -(-total // 10)) == 0:
            left = (time.monotonic() - began) / (done - first) * (total - done)
            more = f", {duration(left)} left" if eta and done < total else ""
            log.info("%s: %d of %d %s%s", title, done, total, unit, more)

    return _patient(line, began + after)


def _patient(told: Progress, since: float) -> Progress:
    """Tell nothing before some time on the clock."""

    def step(done: int, total: int) -> None:
        if time.monotonic() >= since:
            told(done, total)

    return step


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


def with_progress(callbacks: Iterable[Callback], enabled: bool | None) -> list[Callback]:
    """Add what shows the training steps, unless the user has something or wants nothing.

    Args:
        callbacks: of the trainer.
        enabled: its `enable_progress_bar`.

    Returns:
        The callbacks, with a bar in a terminal and lines in a log.
    """
    present = list(callbacks)
    if enabled is False or any(isinstance(callback, ProgressBar) for callback in present):
        return present
    return [*present, StepBar() if sys.stdout.isatty() else StepLines()]


class StepBar(RichProgressBar):
    """Lightning's bar, which without a number of epochs would count them to -2."""

    def _get_train_description(self, current_epoch: int) -> str:
        text = super()._get_train_description(current_epoch)
        return text if self.trainer.max_epochs != -1 else text.replace("/-2", "")


class StepLines(ProgressBar):
    """A plain line with step, loss and time left, every half minute; in long runs less often."""

    def __init__(self, seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Set the pace.

        Args:
            seconds: at least between two lines; a fiftieth of the time passed if that is more.
            clock: seconds from any start.
        """
        super().__init__()
        self._seconds, self._clock, self._on = seconds, clock, True
        self._first = self._began = self._last = self._said = 0.0

    def enable(self) -> None:
        """Show lines."""
        self._on = True

    def disable(self) -> None:
        """Show nothing; Lightning asks for it on all ranks but the first."""
        self._on = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a resumed run starts at its step."""
        super().on_train_start(trainer, pl_module)
        self._first = self._said = trainer.global_step
        self._began = self._last = self._clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where the run is, if it is time to."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step, now = trainer.global_step, self._clock()
        steps = trainer.estimated_stepping_batches  # inf for a run without end
        waited = now - self._last >= max(self._seconds, (now - self._began) / 50)
        if step == self._said or not (waited or step == steps or self._said == self._first):
            return
        self._last, self._said = now, step
        if self._on:
            log.info("%s", self._line(trainer, pl_module, steps))

    def _line(self, trainer: Trainer, pl_module: LightningModule, steps: float) -> str:
        end = f" of {steps:.0f}" if math.isfinite(steps) else ""
        parts = [f"step {trainer.global_step}{end}"]
        for name, value in self.get_metrics(trainer, pl_module).items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{name} {shown}")
        each = (self._last - self._began) / (self._said - self._first)
        left = (steps - self._said) * each
        parts.append(f"{each:.2g} s a step")
        if 0 < left < math.inf:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time span to read.

    Args:
        seconds: at least 0.

    Returns:
        For example "40 s", "12 min", "3.5 h".
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
