"""Structure travels with the weights: what plprune adds to a checkpoint, and reading it before weights load.

Lightning hands callbacks their state after the weights, too late for a model of another size. Two things reach every
checkpoint of a single file: the strategy's checkpoint IO (every save goes through it) and the module's
`on_load_checkpoint` (runs right before the weights load, before optimizers exist).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

KEY = "plprune"
SIDECAR = ".structure.json"

Save = Callable[[], dict[str, Any]]
Load = Callable[[dict[str, Any] | None], None]


class CarryIO(_WrappingCheckpointIO):
    """Adds every registered part to each checkpoint and writes the structure beside it as readable JSON."""

    def __init__(self, inner: CheckpointIO) -> None:
        """Wrap the strategy's own IO."""
        super().__init__(inner)
        self.parts: dict[str, tuple[Save, Load]] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save through the wrapped IO, then the sidecar; both appear under their name only when complete."""
        checkpoint[KEY] = {key: save() for key, (save, _) in self.parts.items()}
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        structure = checkpoint[KEY].get("prune", {}).get("structure")
        if structure is not None and "://" not in str(path):
            write_atomic(Path(f"{path}{SIDECAR}"), json.dumps(structure, indent=1))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load through the wrapped IO."""
        return self.checkpoint_io.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the checkpoint and its sidecar."""
        self.checkpoint_io.remove_checkpoint(path)
        Path(f"{path}{SIDECAR}").unlink(missing_ok=True)


def carry(trainer: Trainer, module: LightningModule, key: str, save: Save, load: Load) -> None:
    """Let a part of the run travel with every checkpoint.

    Args:
        trainer: its strategy's checkpoint IO is wrapped once.
        module: its `on_load_checkpoint` is wrapped once.
        key: name of the part.
        save: returns plain values and tensors (checkpoints load with `weights_only=True`).
        load: called before weights load, with what `save` returned or None if the checkpoint has no such part;
            parts load in the order they were registered.
    """
    checkpoint_io = trainer.strategy.checkpoint_io
    if not isinstance(checkpoint_io, CarryIO):
        checkpoint_io = CarryIO(checkpoint_io)
        trainer.strategy.checkpoint_io = checkpoint_io
    checkpoint_io.parts[key] = (save, load)
    if not isinstance(module.__dict__.get("on_load_checkpoint"), partial):
        own = module.on_load_checkpoint
        # An instance attribute, because this is the only hook of a user's module that runs before its weights load.
        object.__setattr__(module, "on_load_checkpoint", partial(_load_parts, checkpoint_io, own))


def release(module: LightningModule) -> None:
    """Give the module its own `on_load_checkpoint` back.

    Args:
        module: it was wrapped by `carry`.
    """
    module.__dict__.pop("on_load_checkpoint", None)


def _load_parts(
    carried: CarryIO, own: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]
) -> None:
    parts = checkpoint.get(KEY, {})
    for key, (_, load) in carried.parts.items():
        load(parts.get(key))
    own(checkpoint)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Args:
        path: final name.
        text: content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
