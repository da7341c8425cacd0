"""Structure travels with the weights: runs killed anywhere go on bit for bit, and what does not fit is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
from fitting import User, fit, hashes, prune, weights
from plprune.callbacks import LoRARecovery
from plprune.lit import carry

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

STEPS = 12
# Seven batches an epoch, two a step: steps end with batches 1 3 5 6 | 8 10 12 13 | 15 ... (from 0); cuts after 2, 5, 8.
KILLS = {3: 1, 4: 2, 7: 4, 10: 5, 14: 8}
"""Batch at whose start the process dies -> optimizer steps saved: inside a window before the first cut, right after
a cut, at the start of an epoch, inside a window after the second cut, right after the last cut."""


class Killed(Callback):
    """Dies without a farewell; ModelCheckpoint, the last callback, has saved the step before."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Only here: the save of a step is complete by the next batch."""
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kind: str, *, kill: Callback | None = None, resume: bool = False) -> Any:
    """A run with LoRA dropout 0.1 on LitTokens-like batches; 7 batches an epoch, validation every 3.

    Args:
        folder: of its checkpoints.
        kind: `every-fit`, `last-last_cut`, ...: commit and start of LoRA, `training` for statistics.
        kill: dies on the way.
        resume: from `last.ckpt`.
    """
    commit, start = kind.split("-")
    torch.manual_seed(0)
    module = fitting.Validated(attention_dropout=0.1)
    callbacks: list[Callback] = [
        prune(commit=commit, source="training" if start == "last_cut" else "fresh", window=2),
        LoRARecovery({"r": 3, "lora_dropout": 0.1}, start=start),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_last=True),
    ]
    callbacks += [] if kill is None else [kill]
    trainer = fit(
        module,
        callbacks,
        data=fitting.loader(28),
        val=fitting.val_loader(),
        ckpt_path=folder / "last.ckpt" if resume else None,
        max_steps=STEPS,
        enable_checkpointing=True,
        accumulate_grad_batches=2,
        val_check_interval=3,
        num_sanity_val_steps=1,
    )
    return module, callbacks, trainer


KINDS = ("every-fit", "last-fit", "every-last_cut", "last-last_cut")


def children(folder: Path) -> None:
    """Fork a run for every kind and place and let it die; one process pays for the imports."""
    run(folder / "warm", KINDS[0])
    for kind in KINDS:
        for batch in KILLS:
            process = os.fork()
            if process == 0:
                run(folder / kind / str(batch), kind, kill=Killed(batch))
                os._exit(1)
            _, status = os.waitpid(process, 0)
            assert os.WIFSIGNALED(status), f"the run to be killed at batch {batch} ended by itself"
            assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("resume", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.children(Path({str(folder)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_bit_for_bit(kind: str, killed: Path, tmp_path: Path) -> None:
    whole, (pruner, *_), _ = run(tmp_path, kind)
    for batch, step in KILLS.items():
        folder = killed / kind / str(batch)
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == step
        resumed, (again, *_), _ = run(folder, kind, resume=True)
        rest = len(resumed.losses)
        assert resumed.losses == whole.losses[-rest:], f"killed at batch {batch}"
        assert resumed.rates == whole.rates[-rest:]
        assert hashes(again) == hashes(pruner)
        expected, found = weights(whole), weights(resumed)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), f"{name}, killed at batch {batch}"
