"""FSDP2 and ZeRO-3 read a model straight into their shards, at the size a checkpoint left it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import strategy_runs as runs
import tiny
from plprune.callbacks import LoRARecovery, PruneReport, SizeMonitor
from plprune.lit import model as lit_model
from plprune.lit.loader import TokenLoader
from plprune.lit.model import LearningRate, LitCausalLM
from plprune.lit.strategies.base import Adapter
from plprune.lit.strategies.fsdp2 import FSDP2
from plprune.lit.strategies.zero import ZeROAdapter
from plprune.load import load_hf
from plprune.sharded import full_shape, part, state_of
from ranks import run_ranks

pytestmark = [
    pytest.mark.world_size(3),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3 checkpoint"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]
dividing = pytest.mark.parametrize("name", ["fsdp2", "zero3"])


def base(folder: Path, name: str = "llama-gqa-tied") -> Path:
    tiny.model(name, dtype=torch.float32).save_pretrained(folder)
    return folder


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("nobody may do this here")


def run(
    name: str, world: int, folder: Path, callbacks: list[Callback], **more: Any
) -> tuple[Trainer, LitCausalLM]:
    strategy = runs.STRATEGIES[name][0](world)
    ckpt_path = more.pop("ckpt_path", None)
    trainer = fitting.trainer(callbacks, strategy=strategy, devices=world, **more)
    trainer.ckpt_path = ckpt_path
    module = LitCausalLM(str(folder), learning_rate=LearningRate(peak=3e-3))
    trainer.fit(module, TokenLoader(fitting.blocks(), 1))
    return trainer, module


class Look(Callback):
    """Collects the weights right after the model is there, before any engine is."""

    def __init__(self) -> None:
        self.tensors: dict[str, str] = {}
        self.buffers: dict[str, str] = {}
        self.share = 0.0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Callbacks are set up before the module; asking for the model builds it."""
        pl_module.configure_model()
        model = pl_module.model
        tensors = list(model.parameters())
        self.share = sum(part(t).numel() for t in tensors) / sum(
            full_shape(t).numel() for t in tensors
        )
        self.tensors = {name: runs.digest(tensor) for name, tensor in state_of(model).items()}
        self.buffers = {name: runs.digest(buffer) for name, buffer in model.named_buffers()}


@dividing
@pytest.mark.parametrize("variant", ["llama-gqa-tied", "phi3-gqa", "gpt_neox-mha"])
def test_no_process_loads_a_whole_model(
    name: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = base(tmp_path, variant)
    monkeypatch.setattr(lit_model, "load_hf", refuse)

    def ranks() -> Any:
        look = Look()
        run(name, 3, folder, [look], max_steps=1)
        return look.share, look.tensors, look.buffers

    for share, tensors, buffers in run_ranks(ranks, 3):
        assert share < 0.37, "a third, and what rounding adds"
        loaded: Any = load_hf(folder, dtype=torch.float32)
        assert tensors == {key: runs.digest(t) for key, t in loaded.state_dict().items()}
        assert buffers == {key: runs.digest(t) for key, t in loaded.named_buffers()}


def pruned() -> list[Callback]:
    return [fitting.prune()]


def adapted() -> list[Callback]:
    return [fitting.prune(), LoRARecovery({"r": 2})]


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


@dividing
@pytest.mark.parametrize("make", [pruned, adapted])
def test_a_checkpoint_is_loaded_at_its_size(
    name: str,
    make: Callable[[], list[Callback]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Cuts at steps 2, 5 and 8; resumed at 6, nothing is cut but what is due."""
    folder = base(tmp_path / "base")
    adapter: type[Adapter] = FSDP2 if name == "fsdp2" else ZeROAdapter
    measured: list[str] = []
    monkeypatch.setattr(PruneReport, "_score", lambda *given: measured.append(given[-1]))

    def noted(report: str) -> tuple[SizeMonitor, PruneReport]:
        return SizeMonitor(), PruneReport(str(tmp_path / report), prompts=[], measure_speed=False)

    def first() -> Any:
        seen = Losses()
        saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=6, save_top_k=-1)
        callbacks = [*make(), *noted("first"), saver, seen]
        run(name, 3, folder, callbacks, enable_checkpointing=True)
        return seen.values

    uninterrupted = run_ranks(first, 3)
    checkpoint = next((tmp_path / "ckpt").glob("*step=6.ckpt"))
    own = adapter.recut
    made: list[int] = []

    def counted(self: Any, trainer: Any, *args: Any, **more: Any) -> Any:
        made.append(trainer.global_step)
        return own(self, trainer, *args, **more)

    monkeypatch.setattr(adapter, "recut", counted)
    monkeypatch.setattr(lit_model, "load_hf", refuse)

    def again() -> Any:
        seen, monitor = Losses(), SizeMonitor()
        callbacks = [*make(), *noted("again"), monitor, seen]
        run(name, 3, folder, callbacks, ckpt_path=str(checkpoint))
        return seen.values, list(made), monitor.current, measured

    for before, (values, cuts, kept, scores) in zip(uninterrupted, run_ranks(again, 3), strict=True):
        assert cuts == [8], "the structure of the checkpoint was there from the start"
        assert fitting.gap(values, before[6:]) < 1e-5, "float32"
        assert kept["params_kept_blocks"] < 0.8, "of the dense model, not of the checkpoint's"
        assert scores == ["pruned perplexity"], "the dense model is not there to be measured"
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("first", "again")]
    assert reports[1]["sizes"] == reports[0]["sizes"]


@dividing
def test_a_model_that_is_converted_is_loaded_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from plprune.lit import streamed

    folder = base(tmp_path)
    monkeypatch.setattr(streamed, "matched", lambda *_: None)

    def ranks() -> Any:
        seen = Losses()
        run(name, 3, folder, [seen], max_steps=2)
        return seen.values

    def as_usual() -> Any:
        monkeypatch.undo()
        return ranks()

    assert fitting.gap(run_ranks(ranks, 3)[0], run_ranks(as_usual, 3)[0]) < 1e-6
