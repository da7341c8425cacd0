"""A run goes on with another strategy, or on another number of processes, with its moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import strategy_runs as runs
from plprune.callbacks import LoRARecovery
from plprune.lit.saved import state as saved_state
from ranks import RankError
from strategy_runs import on_ranks

pytestmark = [
    pytest.mark.world_size(3),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3 checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]
STEP = 6  # cuts are made at 2, 5 and 8
BATCH = 12
MOVES = [
    ("zero3", 2, "alone", 1),
    ("zero3", 2, "fsdp2", 2),
    ("zero3", 2, "zero3", 3),
    ("zero2", 2, "zero2", 1),
    ("zero2", 3, "zero3", 2),
    ("zero1", 2, "zero2", 2),
    ("fsdp2", 2, "alone", 1),
    ("fsdp2", 2, "fsdp2", 3),
    ("fsdp2", 3, "zero3", 2),
    ("fsdp2", 2, "zero1", 3),
    ("alone", 1, "zero3", 2),
    ("alone", 1, "zero2", 2),
    ("alone", 1, "fsdp2", 2),
    ("ddp", 2, "zero3", 2),
    ("zero3", 2, "ddp", 2),
]


def pruned() -> list[Callback]:
    return [fitting.prune()]


def masked() -> list[Callback]:
    return [fitting.prune(commit="last")]


def adapted() -> list[Callback]:
    torch.manual_seed(0)  # the factors are drawn when the trainer starts
    return [fitting.prune(), LoRARecovery({"r": 2})]


def run(name: str, world: int, **settings: Any) -> dict[str, Any]:
    """All in float32: what one strategy saved the other takes as it is."""
    settings = {"global_batch": BATCH, "rows": 240, "module": runs.Single, **settings}
    if name == "alone":
        return runs.fit(**settings)
    if name == "fsdp2":
        settings["module"] = Sharded32
    return on_ranks(name, world, **settings)[0]


class Sharded32(runs.Sharded, runs.Single):
    """Shards itself, in float32."""


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=STEP, save_top_k=-1, filename="{step}")


def start(name: str, world: int, folder: Path, **settings: Any) -> Path:
    """A run that leaves a checkpoint in the middle."""
    own = settings.pop("callbacks")
    callbacks = lambda: [*own(), saver(folder)]  # noqa: E731
    run(name, world, callbacks=callbacks, enable_checkpointing=True, **settings)
    return folder / f"step={STEP}.ckpt"


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[..., dict[str, Any]]:
    known: dict[Any, dict[str, Any]] = {}

    def curve(**settings: Any) -> dict[str, Any]:
        key = tuple(settings.values())
        if key not in known:
            known[key] = run("alone", 1, **settings)
        return known[key]

    return curve


@pytest.mark.parametrize(("name", "world", "to", "there"), MOVES)
@pytest.mark.parametrize("make", [pruned, adapted])
def test_a_run_moves(
    name: str,
    world: int,
    to: str,
    there: int,
    make: Callable[[], list[Callback]],
    tmp_path: Path,
    uninterrupted: Callable[..., dict[str, Any]],
):
    settings = {"callbacks": make, "optimizer": "one group" if make is adapted else "adamw"}
    whole = uninterrupted(**settings)
    path = start(name, world, tmp_path, **settings)
    found = run(to, there, ckpt_path=path, **settings)
    assert found["plans"] == whole["plans"]
    assert found["widths"] == whole["widths"]
    assert found["steps"] == whole["steps"]
    assert found["rates"][-1] == whole["rates"][-1]
    # Every micro-batch has its own loss; their mean is that of the global batch.
    assert runs.gap(found, {"losses": whole["losses"][STEP:]}) < 2e-5, "float32, other sums"
