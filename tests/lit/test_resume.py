"""Structure travels with the weights: killed runs go on bit for bit, misfits are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
from fitting import User, fit, gap, hashes, prune, weights
from oracles import close
from plprune.callbacks import LoRARecovery
from plprune.errors import CheckpointError, StructureError
from plprune.lit import carry, guard

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

STEPS = 12
# Seven batches an epoch, two a step: steps end with batches 1 3 5 6 | 8 10 12 13 | 15 ... (from 0);
# cuts after 2, 5, 8.
KILLS = {3: 1, 4: 2, 7: 4, 10: 5, 14: 8}
"""Batch at whose start the process dies -> optimizer steps saved: inside a window before the first
cut, right after a cut, at the start of an epoch, inside a window after the second cut, right after
the last cut."""


class Killed(Callback):
    """Dies without a farewell; ModelCheckpoint, the last callback, has saved the step before."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Only here: the save of a step is complete by the next batch."""
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kind: str, *, kill: Callback | None = None, resume: bool = False) -> Any:
    """A run with LoRA dropout 0.1 on LitTokens-like batches; 7 batches an epoch.

    Args:
        folder: of its checkpoints.
        kind: `every-fit`, `last-last_cut`, ...: commit and start of LoRA, `training` for
            statistics.
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


def places(kind: str) -> tuple[int, ...]:
    """All places for the two kinds that differ most, two for the others."""
    return tuple(KILLS) if kind in ("every-fit", "last-last_cut") else (4, 10)


def children(folder: Path) -> None:
    """Fork a run for every kind and place and let it die; one process pays for the imports."""
    run(folder / "warm", KINDS[0])
    for kind in KINDS:
        for batch in places(kind):
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
    whole, (pruner, *_), _ = run(tmp_path / "whole", kind)
    for batch in places(kind):
        folder, step = (
            shutil.copytree(killed / kind / str(batch), tmp_path / str(batch)),
            KILLS[batch],
        )
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


def test_without_the_random_state_it_would_not(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, batch = "last-fit", 4
    folder = shutil.copytree(killed / kind / str(batch), tmp_path / "copy")
    whole, *_ = run(tmp_path / "whole", kind)
    monkeypatch.setattr(guard.RandomState, "restore", lambda self: None)
    resumed, *_ = run(folder, kind, resume=True)
    assert gap(resumed.losses, whole.losses[-len(resumed.losses) :]) > 1e-9


# --- files ---------------------------------------------------------------------------------------


def saved_run(folder: Path, **settings: Any) -> tuple[User, Any]:
    """A run that keeps a checkpoint of every step."""
    module, pruner = User(), prune(commit=settings.pop("commit", "every"))
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **settings
    )
    fit(module, [pruner, keep], enable_checkpointing=True, max_steps=9)
    return module, pruner


@pytest.mark.parametrize("weights_only", [False, True])
def test_structure_is_in_every_checkpoint_and_beside_it(weights_only: bool, tmp_path: Path) -> None:
    _, pruner = saved_run(tmp_path, save_weights_only=weights_only)
    names = {f"step={step}.ckpt" for step in range(1, 10)}
    found = {path.name for path in tmp_path.iterdir()}
    assert found == names | {f"{name}.structure.json" for name in names}
    widths = []
    for step in range(1, 10):
        file = tmp_path / f"step={step}.ckpt"
        saved = torch.load(file, weights_only=True)
        beside = json.loads(Path(f"{file}{carry.SIDECAR}").read_text("utf-8"))
        assert beside == saved[carry.KEY]["prune"]["structure"]
        assert ("optimizer_states" in saved) is not weights_only
        ffn = saved["state_dict"]["policy.model.layers.1.mlp.up_proj.weight"].shape[0]
        assert beside["blocks"][1]["ffn"] == ffn
        widths.append(ffn)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 4
    assert beside == pruner.progressive.structure()


def test_the_file_beside_goes_with_its_checkpoint(tmp_path: Path) -> None:
    module, pruner = User(), prune()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    fit(module, [pruner, keep], enable_checkpointing=True, max_steps=9)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step=8.ckpt",
        "step=8.ckpt.structure.json",
    }


def test_a_save_that_dies_half_way_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_run(tmp_path, save_last=True)
    before = (tmp_path / "last.ckpt").read_bytes()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    source = carry.CarryIO(TorchCheckpointIO())

    def half(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        process = os.getpid()
        os.kill(process, signal.SIGKILL)

    child = os.fork()
    if child == 0:
        TorchCheckpointIO.save_checkpoint = half  # type: ignore[method-assign]
        source.save_checkpoint(checkpoint, tmp_path / "last.ckpt")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert len(left) == 1
    assert (tmp_path / "last.ckpt").read_bytes() == before
    again = prune()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(User(), [again, keep], enable_checkpointing=True, max_steps=10, ckpt_path="last")
    assert len(hashes(again)) == 3


# --- what does not fit ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    saved_run(folder, commit=2)  # cut 1 is masked, 2 and 3 are committed
    return folder


def test_another_base_model_is_refused(finished: Path) -> None:
    other = User(intermediate_size=44)
    before = weights(other)
    with pytest.raises(StructureError, match="the structure belongs to another base model"):
        fit(other, [prune()], ckpt_path=finished / "step=6.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())


def test_a_model_cut_differently_is_refused_with_the_command(finished: Path) -> None:
    module, pruner = User(), prune()
    fit(module, [pruner])
    with pytest.raises(CheckpointError) as caught:
        fit(module, [pruner], ckpt_path=finished / "step=6.ckpt")
    assert "the model in memory has another structure than the checkpoint" in str(caught.value)
    assert "start a new process: plprune test --config ... --ckpt_path ..." in str(caught.value)
    # The same structure goes: the run is over, so the model is the checkpoint's.
    fit(module, [pruner], ckpt_path=finished / "step=9.ckpt", max_steps=10)


def test_masks_of_a_checkpoint_come_back(finished: Path) -> None:
    module, pruner = User(), prune(commit=2)
    state = torch.load(finished / "step=4.ckpt", weights_only=True)["state_dict"]

    def compare(trainer: Any, _: Any) -> int:
        if trainer.global_step == 4:
            assert pruner.progressive.pending
            close(weights(module), state)
        return len(pruner.progressive.masks)

    probe = fitting.Probe(compare)
    fit(module, [pruner, probe], ckpt_path=finished / "step=3.ckpt", max_steps=9)
    assert probe.seen[0] == probe.seen[1] > 0  # before and after step 4
    assert probe.seen[-1] == 0


def test_without_the_callback_torch_refuses_the_sizes(finished: Path) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(User(), [], ckpt_path=finished / "step=9.ckpt")


def test_adapters_cannot_start_from_a_checkpoint_without(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint has no adapters"):
        fit(User(), [prune(), LoRARecovery({"r": 2})], ckpt_path=finished / "step=3.ckpt")


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_a_damaged_file_is_named(finished: Path, tmp_path: Path, keep: int) -> None:
    content = (finished / "step=6.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[:keep])
    with pytest.raises(
        CheckpointError, match=r"the checkpoint is damaged: given .*cut\.ckpt: \d+ bytes"
    ):
        fit(User(), [prune()], ckpt_path=tmp_path / "cut.ckpt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        fit(User(), [prune()], ckpt_path=tmp_path / "none.ckpt")
