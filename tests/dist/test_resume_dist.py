"""Runs on several processes, killed and resumed, give the losses of the uninterrupted run."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import strategy_runs as runs
from plprune.callbacks import LoRARecovery
from plprune.lit import folders
from ranks import start_ranks
from strategy_runs import TOLERANCE, on_ranks

every_strategy = pytest.mark.parametrize("name", list(runs.STRATEGIES))
STEPS = 12
# What a killed run leaves is there on purpose; the last run's callbacks are others.
pytestmark = [
    pytest.mark.world_size(2),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3 checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]


class Kill(Callback):
    """SIGKILL of every process when a number of optimizer steps is done, after all callbacks."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """The batch after the step, so that whatever belongs to the step is done."""
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def pruned() -> list[Callback]:
    return [fitting.prune()]


def masked() -> list[Callback]:
    return [fitting.prune(commit="last")]


def adapted() -> list[Callback]:
    return [fitting.prune(), LoRARecovery({"r": 2})]


def adapted_later() -> list[Callback]:
    return [fitting.prune(), LoRARecovery({"r": 2}, start="last_cut")]


def optimizer_for(make: Callable[[], list[Callback]]) -> str:
    return "one group" if make is adapted_later else "adamw"


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=1)


def killed_at(name: str, step: int, folder: Path, make: Callable[[], list[Callback]]) -> None:
    """Start a run and let it be killed."""

    def run() -> Any:
        callbacks = lambda: [*make(), saver(folder), Kill(step)]  # noqa: E731
        settings = {"optimizer": optimizer_for(make), "enable_checkpointing": True}
        return runs.fit_on(name, 2, callbacks=callbacks, **settings)

    outcomes = start_ranks(run, 2).wait()
    assert [text for _, text in outcomes] == ["died with exit code -9"] * 2


def resumed(name: str, folder: Path, make: Callable[[], list[Callback]]) -> list[dict[str, Any]]:
    callbacks = lambda: [*make(), saver(folder)]  # noqa: E731
    settings = {"optimizer": optimizer_for(make), "enable_checkpointing": True}
    return on_ranks(name, callbacks=callbacks, ckpt_path=folder / "last.ckpt", **settings)


# Cuts are made at steps 2, 5 and 8.
@every_strategy
@pytest.mark.parametrize(
    ("make", "step"),
    [(pruned, 1), (pruned, 5), (pruned, 7), (masked, 6), (adapted, 5), (adapted_later, 9)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_resumed_is_uninterrupted(
    name: str, make: Callable[[], list[Callback]], step: int, tmp_path: Path
):
    whole = on_ranks(name, callbacks=make, optimizer=optimizer_for(make))
    killed_at(name, step, tmp_path, make)
    found = resumed(name, tmp_path, make)
    assert found[0]["plans"] == whole[0]["plans"]
    assert found[0]["widths"] == whole[0]["widths"]
    tail = {"losses": whole[0]["losses"][step:]}
    assert runs.gap(found[0], tail) < TOLERANCE
    assert found[0]["rates"] == whole[0]["rates"][step:]
    assert found[0]["weights"].keys() == whole[0]["weights"].keys()


@every_strategy
def test_resuming_elsewhere_is_another_curve(name: str, tmp_path: Path):
    """Negative control: one step missing."""
    whole = on_ranks(name, callbacks=pruned)
    killed_at(name, 6, tmp_path, pruned)
    found = resumed(name, tmp_path, pruned)
    assert len(found[0]["losses"]) == STEPS - 6
    assert runs.gap(found[0], {"losses": whole[0]["losses"][5:-1]}) > 50 * TOLERANCE


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["while ranks write", "before the rename", "between renames"])
def test_a_save_that_dies_leaves_the_checkpoint_before(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = on_ranks("fsdp2", callbacks=pruned)
    count = {"saves": 0}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    # Two saves a step (the newest and `last`): the twelfth is `last` of step 6.
    def write_then_die(strategy: Any, write: Any, parts: Any, filepath: Any) -> None:
        count["saves"] += 1
        if count["saves"] == 12:
            if moment == "while ranks write":
                die()
            if moment == "before the rename":
                monkeypatch.setattr(folders, "_take_place", lambda *_: die())
            if moment == "between renames":
                monkeypatch.setattr(Path, "rename", dying_rename(Path.rename))
        original(strategy, write, parts, filepath)

    def dying_rename(rename: Any) -> Any:
        def once(self: Path, target: Path) -> Path:
            moved = rename(self, target)
            if target.name.endswith(".old"):
                die()
            return moved

        return once

    original = folders.save
    monkeypatch.setattr(folders, "save", write_then_die)

    def run() -> Any:
        callbacks = lambda: [*pruned(), saver(tmp_path)]  # noqa: E731
        return runs.fit_on("fsdp2", 2, callbacks=callbacks, enable_checkpointing=True)

    outcomes = start_ranks(run, 2).wait()
    assert outcomes[0] == (False, "died with exit code -9")
    monkeypatch.undo()
    found = resumed("fsdp2", tmp_path, pruned)
    assert found[0]["plans"] == whole[0]["plans"]
    assert runs.gap(found[0], {"losses": whole[0]["losses"][5:]}) < TOLERANCE


def test_two_processes_give_a_checkpoint_its_name_back_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both see that the name is missing; the slower one finds the work done."""
    old = tmp_path / ".last.ckpt.old"
    old.mkdir()
    own = Path.rename

    def late(self: Path, target: Path) -> Path:
        own(self, target)  # the other process
        return own(self, target)

    monkeypatch.setattr(Path, "rename", late)
    folders.recover(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").is_dir()
