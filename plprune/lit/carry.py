"""Structure travels with the weights: what plprune adds to a checkpoint, read before they load.

Lightning hands callbacks their state after the weights, too late for a model of another size. Two
things reach every checkpoint of a single file: the strategy's checkpoint IO (every save goes
through it) and the module's
`on_load_checkpoint` (runs right before the weights load, before optimizers exist).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from plprune.errors import CheckpointError
from plprune.files import write_json

KEY = "plprune"
SIDECAR = ".structure.json"

Save = Callable[[], dict[str, Any]]
Load = Callable[[dict[str, Any] | None], None]


class CarryIO(_WrappingCheckpointIO):
    """Adds every registered part to each checkpoint and a readable structure beside it."""

    def __init__(self, inner: CheckpointIO) -> None:
        """Wrap the strategy's own IO."""
        super().__init__(inner)
        self.inner = inner
        self.parts: dict[str, tuple[Save, Load]] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save through the wrapped IO, then the sidecar; each appears only when it is complete."""
        checkpoint[KEY] = {key: save() for key, (save, _) in self.parts.items()}
        with _complete(path, type(self.inner) is TorchCheckpointIO) as target:
            self.inner.save_checkpoint(checkpoint, target, storage_options=storage_options)
        structure = checkpoint[KEY].get("prune", {}).get("structure")
        if structure is not None and "://" not in str(path):
            write_json(f"{path}{SIDECAR}", structure, indent=1)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load through the wrapped IO, with a message for a file that is damaged or missing."""
        require_readable(path)
        try:
            return self.inner.load_checkpoint(path, *args, **kwargs)
        except (EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise _damaged(path, str(error).partition("\n")[0]) from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the checkpoint and its sidecar."""
        self.inner.remove_checkpoint(path)
        Path(f"{path}{SIDECAR}").unlink(missing_ok=True)


def carry(trainer: Trainer, module: LightningModule, key: str, save: Save, load: Load) -> None:
    """Let a part of the run travel with every checkpoint.

    Args:
        trainer: its strategy's checkpoint IO is wrapped once.
        module: its `on_load_checkpoint` is wrapped once.
        key: name of the part.
        save: returns plain values and tensors (checkpoints load with `weights_only=True`).
        load: called before weights load, with what `save` returned or None if the checkpoint has no
            such part; parts load in the order they were registered.
    """
    checkpoint_io = trainer.strategy.checkpoint_io
    if not isinstance(checkpoint_io, CarryIO):
        checkpoint_io = CarryIO(checkpoint_io)
        trainer.strategy.checkpoint_io = checkpoint_io
    checkpoint_io.parts[key] = (save, load)
    own = module.__dict__.get("on_load_checkpoint")
    if not _wrapped(own):
        # An instance attribute, because this is the only hook of a user's module that runs before
        # its weights load.
        hook = partial(_load_parts, checkpoint_io, module, own)
        object.__setattr__(module, "on_load_checkpoint", hook)


def release(module: LightningModule) -> None:
    """Give the module its own `on_load_checkpoint` back; later checkpoints still carry the parts.

    Args:
        module: it was wrapped by `carry`, or not.
    """
    hook = module.__dict__.get("on_load_checkpoint")
    if not _wrapped(hook):
        return
    own = hook.args[2]
    if own is None:
        del module.__dict__["on_load_checkpoint"]
    else:
        module.__dict__["on_load_checkpoint"] = own


def _wrapped(hook: Any) -> TypeGuard[partial[None]]:
    return isinstance(hook, partial) and hook.func is _load_parts


def _load_parts(
    carried: CarryIO,
    module: LightningModule,
    own: Callable[[dict[str, Any]], None] | None,
    checkpoint: dict[str, Any],
) -> None:
    parts = checkpoint.get(KEY, {})
    for key, (_, load) in carried.parts.items():
        load(parts.get(key))
    hook = partial(type(module).on_load_checkpoint, module) if own is None else own
    hook(checkpoint)


def require_readable(path: Any) -> None:
    """Refuse a checkpoint file that is missing or cut short, before anything is built for it.

    Args:
        path: local file; directories, remote places and Lightning's keywords are left to Lightning.

    Raises:
        CheckpointError: naming the file.
    """
    file = Path(str(path))
    if "://" in str(path) or file.is_dir():
        return
    if not file.exists():
        raise CheckpointError("there is no such checkpoint", given=str(path), fix="check ckpt_path")
    if not zipfile.is_zipfile(file):
        raise _damaged(path, f"{file.stat().st_size} bytes without an end")


def _damaged(path: Any, why: str) -> CheckpointError:
    return CheckpointError(
        "the checkpoint is damaged",
        given=f"{path}: {why}",
        allowed="a complete file written by Lightning",
        fix="resume from the checkpoint before it",
    )


@contextmanager
def _complete(path: Any, plain: bool) -> Iterator[Any]:
    """A name to write to that becomes `path` at the end: a killed process leaves no half a file.

    Lightning writes to the system's temporary folder and moves; between file systems that is a
    copy.
    """
    if not plain or "://" in str(path):
        yield path
        return
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
