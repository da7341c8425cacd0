"""A user's own LightningModule and short runs around it, for the tests of pruning inside `fit`.

module = User(dtype=torch.float64)
fit(module, [prune()])
module.losses        # of every micro-batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import tiny
from plprune.budget import Budget
from plprune.callbacks import Prune, Statistics
from plprune.lit.loader import TokenLoader
from plprune.methods.transact import TransAct
from plprune.schedule import Linear, Schedule
from tiny_tokenizer import tiny_tokenizer

BUDGET = Budget(keep=0.6, widths={"kv_group": 2}, multiple_of={"mlp": 4})
Optimizers = Callable[[Any], Any]


def adamw(module: LightningModule) -> Any:
    """AdamW with weight decay and a cosine over 40 steps."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class User(LightningModule):
    """Nothing of plprune in it: the model hangs under a name of the user's."""

    def __init__(
        self,
        name: str = "policy",
        *,
        dtype: torch.dtype = torch.float64,
        optimizers: Optimizers = adamw,
        variant: str = "llama-gqa",
        **config: Any,
    ) -> None:
        super().__init__()
        self.hangs, self.optimizers_of = name, optimizers
        setattr(self, name, tiny.model(variant, dtype=dtype, **config).train())
        self.losses: list[float] = []
        self.rates: list[float] = []

    @property
    def net(self) -> Any:
        """The model."""
        return getattr(self, self.hangs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token loss."""
        loss: Tensor = self.net(**{"labels": batch["input_ids"], **batch}, use_cache=False).loss
        self.losses.append(float(loss.detach()))
        self.rates.append(self.trainer.strategy.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_optimizers(self) -> Any:
        """Whatever the test wants."""
        return self.optimizers_of(self)


class Validated(User):
    """The same with validation."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Validation loss."""
        self.net(**{"labels": batch["input_ids"], **batch}, use_cache=False)


def blocks(count: int = 64, length: int = 12, seed: int = 5) -> Tensor:
    """[count, length] training tokens."""
    return tiny.tokens(count, length, seed=seed)


def loader(count: int = 64, batch: int = 4) -> TokenLoader:
    """Training batches, seeded, resumable."""
    return TokenLoader(blocks(count), batch)


def val_loader(count: int = 4) -> Any:
    """Validation batches of one row."""
    rows = [{"input_ids": row} for row in blocks(count, seed=11)]
    return DataLoader(rows, batch_size=2)


def linear(cuts: int = 3, begin: float = 2, end: float = 8) -> Schedule:
    """Cuts at equal distances in optimizer steps."""
    return Linear(cuts=cuts, begin=begin, end=end, unit="step")


def prune(schedule: Schedule | None = None, **more: Any) -> Prune:
    """Three cuts at steps 2, 5 and 8 on batches given by hand."""
    source = more.pop("source", "fresh")
    batches = None if source == "training" else tiny.batches(2)
    statistics = Statistics(source=source, batches=batches, window=more.pop("window", 8))
    return Prune(
        more.pop("method", TransAct()),
        more.pop("budget", BUDGET),
        schedule or linear(),
        statistics=statistics,
        **more,
    )


def trainer(callbacks: Sequence[Callback] = (), **more: Any) -> Trainer:
    """A quiet trainer on the CPU, 12 optimizer steps."""
    settings: dict[str, Any] = {
        "max_steps": 12,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
        **more,
    }
    return Trainer(**settings)


def fit(
    module: LightningModule,
    callbacks: Sequence[Callback] = (),
    *,
    data: Any = None,
    val: Any = None,
    ckpt_path: str | Path | None = None,
    **more: Any,
) -> Trainer:
    """Run `fit` on fresh loaders."""
    made = trainer(callbacks, **more)
    if isinstance(data, LightningDataModule):
        made.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        made.fit(module, data or loader(), val, ckpt_path=ckpt_path)
    return made


def hashes(pruner: Prune) -> list[str]:
    """Plan hashes of the cuts so far."""
    assert pruner.progressive is not None
    return [entry["plan"] for entry in pruner.progressive.history]


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def gap(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two loss curves of equal length."""
    assert len(one) == len(other) > 0, "curves of different length"
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


class Probe(Callback):
    """Calls a function at the end of every batch, and at the start of training."""

    def __init__(self, look: Callable[[Trainer, LightningModule], Any]) -> None:
        self.look, self.seen = look, list[Any]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch."""
        self.seen.append(self.look(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After every batch."""
        self.seen.append(self.look(trainer, pl_module))


def saved(folder: Path) -> Path:
    """A dense model with a tokenizer, and a text, in a folder."""
    tiny_tokenizer(folder)
    tiny.model(dtype=torch.float32, vocab_size=256).save_pretrained(folder)
    words = [
        f"{a} {b} {a}{b}" for a in ["the", "cat", "of", "a", "king"] for b in ["sat", "on", "mat"]
    ]
    (folder / "text.txt").write_text(" ".join(words * 40), encoding="utf-8")
    return folder


def run_values(base: Path, out: Path, *, steps: int, last_cut: int) -> dict[str, Any]:
    """The keys of a small run of `plprune fit`: cuts after step 2 and a later one.

    Args:
        base: from `saved`.
        out: where checkpoints go, one of every step.
        steps: of training.
        last_cut: step of the second cut.
    """
    saver = {"dirpath": str(out / "ckpt"), "filename": "{step}", "every_n_train_steps": 1}
    text = str(base / "text.txt")
    return {
        "seed_everything": 1,
        "model": {"pretrained": str(base), "learning_rate": {"peak": 0.01}, "dtype": "float32"},
        "data": {
            "train": text,
            "val": text,
            "tokenizer": str(base),
            "seq_len": 16,
            "batch_size": 2,
            "val_windows": 4,
            "calibration_samples": 4,
            "max_train_tokens": 400,
        },
        "prune": {
            "method": {"class_path": "plprune.methods.transact.TransAct"},
            "budget": {"keep": 0.7, "widths": {"kv_group": 2}, "multiple_of": {"mlp": 4}},
            "schedule": {
                "class_path": "plprune.schedule.Linear",
                "init_args": {"cuts": 2, "begin": 2, "end": last_cut, "unit": "step"},
            },
        },
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(out),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {**saver, "save_top_k": -1},
                }
            ],
        },
    }
