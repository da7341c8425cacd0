"""What a run leaves behind: folders that do not collide, and an end that is not skipped."""

from __future__ import annotations

import logging
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from plprune.errors import CheckpointError, ConfigError
from plprune.lit import guard

log = logging.getLogger(__name__)


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


def require_all_cuts(trainer: Trainer) -> None:
    """Refuse to end a run whose schedule has cuts that will never come.

    Args:
        trainer: all its steps are done.

    Raises:
        CheckpointError: if cuts are left; only another length or schedule than the checkpoint's
            leaves some.
    """
    pruner = guard.pruner_of(trainer)
    done = 0 if pruner is None else pruner.progressive.done
    if pruner is not None and done < len(pruner.cuts):
        raise CheckpointError(
            "the run has no step left for its cuts",
            given=f"{done} of {len(pruner.cuts)} cuts in the checkpoint of step "
            f"{trainer.global_step}, trainer.max_steps {trainer.max_steps}, max_epochs "
            f"{trainer.max_epochs}",
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
        elif 0 <= trainer.max_steps < trainer.global_step:
            raise CheckpointError(
                "the checkpoint is past the end of this run",
                given=f"step {trainer.global_step} in the checkpoint, trainer.max_steps "
                f"{trainer.max_steps}",
                allowed=f"max_steps of at least {trainer.global_step}",
                fix="set max_steps of the run the checkpoint is from; to write its model as it "
                "is: plprune export --ckpt_path FILE --out DIR",
            )
        else:
            require_all_cuts(trainer)
            log.info(
                "all %d steps are done: what comes after training follows", trainer.global_step
            )
            loop.on_run_end()

    loop.run = run
