"""What a run leaves behind: folders that do not collide, and an end that is not skipped."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from plprune.errors import CheckpointError, ConfigError
from plprune.lit import guard
from plprune.lit.saved import rest_of
from plprune.lit.saved.state import PARTS

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
"""What a CSV logger writes, and deletes when it starts."""


def require_apart(trainer: Trainer) -> None:
    """Refuse output folders that are one, or lie inside each other, before training.

    Args:
        trainer: its callbacks say in `writes` where they write.

    Raises:
        ConfigError: naming both.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [(type(c).__name__, getattr(c, "writes", None)) for c in callbacks]
    targets = [(name, Path(path).absolute()) for name, path in found if path is not None]
    for (one, first), (other, second) in combinations(targets, 2):
        if first == second or first in second.parents or second in first.parents:
            raise ConfigError(
                "two outputs share a folder",
                given=f"{first} of {one} and {second} of {other}",
                allowed="folders beside each other: each is replaced as a whole",
                fix="choose another folder for one of them",
            )


_FIRST = {
    "merge_at_end": "it merges the adapters at the end of training",
    "report": "its scores go into the model card",
}
"""Attribute of a callback that must come before others, and why."""


def require_last(trainer: Trainer, callback: Callback, *, after: str = "merge_at_end") -> None:
    """Refuse a callback that would look at the model, or at a report, too early.

    Args:
        trainer: with its callbacks.
        callback: does its work at the end of training.
        after: attribute of the callbacks it must stand behind, a key of `_FIRST`.

    Raises:
        ConfigError: if one of them stands after it.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    later = callbacks[callbacks.index(callback) + 1 :]
    found = next((other for other in later if hasattr(other, after)), None)
    if found is not None:
        names = type(found).__name__, type(callback).__name__
        raise ConfigError(
            "callbacks stand in an order that cannot work",
            given=f"{names[1]} before {names[0]}",
            allowed=f"{names[0]} first: {_FIRST[after]}",
            fix=f"put {names[1]} after it in trainer.callbacks",
        )


def require_targets(trainer: Trainer) -> None:
    """Refuse outputs that share a folder, or have none to be written to; on the first process.

    Args:
        trainer: with its callbacks; those that write have a `require_target`.

    Raises:
        ConfigError: for folders that are one, or lie inside each other.
        ExportError: for a folder that exists, or cannot be made.
    """
    require_apart(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "require_target"):
            callback.require_target(trainer)


def keep_metrics(trainer: Trainer) -> None:
    """Put the metrics of an earlier run aside, which a CSV logger of the same folder would delete.

    Args:
        trainer: before its loggers are used; on the first process.
    """
    for logger in trainer.loggers:
        # Without a version the logger takes a folder of its own.
        if not isinstance(logger, CSVLogger) or logger._version is None:
            continue
        folder, number = Path(logger.log_dir), 1
        if (folder / METRICS).is_file():
            while (kept := folder / METRICS.replace(".", f"_{number}.")).exists():
                number += 1
            (folder / METRICS).rename(kept)
            log.info("the metrics of an earlier run are kept: %s", kept)


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a checkpoint is."""

    step: int
    """Optimizer steps."""
    epochs: int
    """Epochs whose batches are all done."""
    cuts: int
    """Cuts made."""


def position_of(path: Any) -> Position | None:
    """How far a checkpoint is.

    Args:
        path: file or folder.

    Returns:
        Its position; None if the path is not of this machine, or the file says so only to those who
        run what is in it.
    """
    if path is None or not Path(str(path)).exists():
        return None
    try:
        saved = rest_of(Path(str(path)))
    except CheckpointError:
        return None
    loop = (saved.get("loops") or {}).get("fit_loop") or {}
    epochs = ((loop.get("epoch_progress") or {}).get("current") or {}).get("processed", 0)
    cuts = ((saved.get(PARTS) or {}).get("prune") or {}).get("done", 0)
    return Position(step=saved.get("global_step", 0), epochs=epochs, cuts=cuts)


def only_ends(trainer: Trainer) -> bool:
    """Whether a run goes on from a checkpoint of its last step: it measures, merges, and writes.

    Args:
        trainer: with the checkpoint's path, if it has one.
    """
    found = position_of(trainer.ckpt_path)
    if found is None:
        return False
    pairs = ((found.step, trainer.max_steps), (found.epochs, trainer.max_epochs))
    return any(have >= end for have, end in pairs if end not in (None, -1))


def require_not_past(step: int, limit: int) -> None:
    """Refuse to resume a checkpoint past the end of the run.

    Args:
        step: optimizer steps in the checkpoint.
        limit: `trainer.max_steps`; -1: no limit.

    Raises:
        CheckpointError: with both numbers.
    """
    if 0 <= limit < step:
        raise CheckpointError(
            "the checkpoint is past the end of this run",
            given=f"step {step} in the checkpoint, trainer.max_steps {limit}",
            allowed=f"max_steps of at least {step}",
            fix="set max_steps of the run the checkpoint is from; to write its model as it "
            "is: plprune export --ckpt_path FILE --out DIR",
        )


def require_all_cuts(step: int, done: int, cuts: int) -> None:
    """Refuse to end a run whose schedule has cuts that will never come.

    Args:
        step: the last optimizer step of the run, that of its checkpoint.
        done: cuts in the checkpoint.
        cuts: of the run.

    Raises:
        CheckpointError: if cuts are left; only another length or schedule than the checkpoint's
            leaves some.
    """
    if done < cuts:
        raise CheckpointError(
            "the run has no step left for its cuts",
            given=f"{done} of {cuts} cuts in the checkpoint of step {step}, the last of this run",
            allowed="a run that is longer than its checkpoint, or that has made all cuts",
            fix="set the length and the schedule of the run the checkpoint is from",
        )


def end_complete_runs(trainer: Trainer) -> None:
    """Let a run that has no step left do what comes after training, instead of nothing.

    A checkpoint of the last step is resumed when a run was killed while it measured, merged or
    exported; Lightning leaves `fit` then without a word.

    Args:
        trainer: its loop is changed, once.
    """
    loop: Any = trainer.fit_loop
    if "run" in vars(loop):
        return
    own = loop.run

    def run() -> None:
        loop.setup_data()
        if not loop.skip:
            own()
        elif trainer.global_step == 0:
            raise ConfigError(
                "the run has no training step",
                given=f"max_steps {trainer.max_steps}, max_epochs {trainer.max_epochs}, "
                f"limit_train_batches {trainer.limit_train_batches}",
                allowed="at least one step before max_steps, max_epochs or max_time",
                fix="raise them in trainer",
            )
        else:
            pruner = guard.pruner_of(trainer)
            done = 0 if pruner is None else pruner.progressive.done
            cuts = 0 if pruner is None else len(pruner.cuts)
            require_not_past(trainer.global_step, trainer.max_steps)
            require_all_cuts(trainer.global_step, done, cuts)
            log.info(
                "all %d steps are done: what comes after training follows", trainer.global_step
            )
            loop.on_run_end()

    loop.run = run
