"""Structure travels with the weights: what plprune adds to a checkpoint, read before they load.

Lightning hands callbacks their state after the weights, too late for a model of another size. What
reaches every checkpoint instead: the strategy's `save_checkpoint`, which all ranks call, and on the
way back the module's `on_load_checkpoint`, which runs right before the weights load. Strategies
that divide the weights load them themselves, from a folder, when optimizers exist already; there
the parts are read before the strategy's own `load_checkpoint`.
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from plprune.dist import together
from plprune.errors import CheckpointError
from plprune.files import write_json
from plprune.lit import folders
from plprune.lit.readable import damaged, require_readable
from plprune.lit.saved import open_saved
from plprune.lit.saved.state import GROUPS, PARTS, as_checkpoint
from plprune.lit.strategies import adapter_for, groups_of
from plprune.lit.strategies.filling import require_same_optimizer

KEY = PARTS
log = logging.getLogger(__name__)

SIDECAR = ".structure.json"

Save = Callable[[], dict[str, Any]]
Load = Callable[[dict[str, Any] | None], None]


@dataclass(eq=False)
class Carried:
    """The parts of a run that travel with its checkpoints."""

    strategy: Strategy
    """Saves and loads."""
    parts: dict[str, tuple[Save, Load]] = field(default_factory=dict)
    """How to save and load each part, in the order they were registered."""
    loaded: bool = False
    """The parts of the checkpoint being loaded were read before its weights."""

    def save(
        self,
        own: Callable[..., None],
        checkpoint: dict[str, Any],
        filepath: Any,
        storage_options: Any | None = None,
    ) -> None:
        """Save as the strategy does, with the parts; called on all ranks."""
        checkpoint[KEY] = {key: save() for key, (save, _) in self.parts.items()}
        checkpoint[KEY][GROUPS] = groups_of(_trainer(self.strategy))
        write = partial(own, checkpoint, storage_options=storage_options)
        if folders.are_written_by(self.strategy):
            folders.save(self.strategy, write, checkpoint[KEY], filepath)
        else:
            write(filepath)

    def load(self, own: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as the strategy does; parts first, if the strategy loads weights itself."""
        with together():
            if self.strategy.is_global_zero:
                require_readable(path)
        if not self.strategy.restore_checkpoint_after_setup:
            return own(path, *args, **kwargs)
        with together():
            saved = folders.parts_of(path, KEY)
        self.restore(saved)
        self.require_claimed(saved)
        self.loaded = True
        trainer = _trainer(self.strategy)
        adapter = adapter_for(self.strategy)
        with together():
            fits = adapter.fits(trainer, Path(path))
        if fits:
            return own(path, *args, **kwargs)
        log.info("%s was written by another strategy or number of processes", path)
        with together():
            state = open_saved(Path(path))
        adapter.fill(trainer, state)
        return state.rest

    def load_optimizers(self, own: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
        """Load as the strategy does, into an optimizer of the same kind."""
        saved = (checkpoint.get(KEY) or {}).get(GROUPS) or []
        now = groups_of(_trainer(self.strategy))
        if saved and now:
            require_same_optimizer(now, saved)
        own(checkpoint)

    def restore(self, saved: dict[str, Any]) -> None:
        """Hand every part what a checkpoint holds of it."""
        for key, (_, load) in self.parts.items():
            load(saved.get(key))

    def require_claimed(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint with adapters that nobody puts on the model.

        Raises:
            CheckpointError: naming the callback that is missing.
        """
        if saved.get("lora", {}).get("injected", False) and "lora" not in self.parts:
            raise CheckpointError(
                "the checkpoint has LoRA adapters",
                given="a run without",
                fix="use the config of the run with its `lora` key (in a script: the same "
                "LoRARecovery)",
            )


class CarryIO(_WrappingCheckpointIO):
    """Writes single files completely or not at all, with a readable structure beside them."""

    def __init__(self, inner: CheckpointIO) -> None:
        """Wrap the strategy's own IO."""
        super().__init__(inner)
        self.inner = inner

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save through the wrapped IO, then the sidecar; each appears only when it is complete."""
        with _complete(path, type(self.inner) is TorchCheckpointIO) as target:
            self.inner.save_checkpoint(checkpoint, target, storage_options=storage_options)
        structure = checkpoint.get(KEY, {}).get("prune", {}).get("structure")
        if structure is not None and "://" not in str(path):
            write_json(f"{path}{SIDECAR}", structure, indent=1)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load through the wrapped IO, with a message for a file that is damaged or missing."""
        require_readable(path)
        if Path(str(path)).is_dir():
            return as_checkpoint(open_saved(Path(str(path))))
        try:
            return self.inner.load_checkpoint(path, *args, **kwargs)
        except (EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise damaged(path, str(error).partition("\n")[0]) from error

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the checkpoint and its sidecar."""
        self.inner.remove_checkpoint(path)
        Path(f"{path}{SIDECAR}").unlink(missing_ok=True)


def carry(trainer: Trainer, module: LightningModule, key: str, save: Save, load: Load) -> None:
    """Let a part of the run travel with every checkpoint.

    Args:
        trainer: its strategy and its checkpoint IO are wrapped once.
        module: its `on_load_checkpoint` is wrapped once.
        key: name of the part.
        save: called on all ranks; returns plain values and tensors (checkpoints load with
            `weights_only=True`), of which those of rank 0 are written.
        load: called before weights load, with what `save` returned or None if the checkpoint has no
            such part; parts load in the order they were registered.
    """
    carried = _carried(trainer.strategy)
    carried.parts[key] = (save, load)
    own = module.__dict__.get("on_load_checkpoint")
    if not _wrapped(own):
        # An instance attribute, because this is the only hook of a user's module that runs before
        # its weights load.
        hook = partial(_load_parts, carried, module, own)
        object.__setattr__(module, "on_load_checkpoint", hook)


def _carried(strategy: Strategy) -> Carried:
    found: Any = strategy.__dict__.get("_plprune_carried")
    if found is not None:
        return found  # type: ignore[no-any-return]
    made = Carried(strategy)
    own: Any = strategy
    own.checkpoint_io = CarryIO(strategy.checkpoint_io)
    own.save_checkpoint = partial(made.save, strategy.save_checkpoint)
    own.load_checkpoint = partial(made.load, strategy.load_checkpoint)
    loads = strategy.load_optimizer_state_dict
    own.load_optimizer_state_dict = partial(made.load_optimizers, loads)
    own._plprune_carried = made
    return made


def _trainer(strategy: Strategy) -> Trainer:
    assert strategy.lightning_module is not None, "attached"
    return strategy.lightning_module.trainer


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
    carried: Carried,
    module: LightningModule,
    own: Callable[[dict[str, Any]], None] | None,
    checkpoint: dict[str, Any],
) -> None:
    if not carried.loaded:
        carried.restore(checkpoint.get(KEY, {}))
    carried.loaded = False
    hook = partial(type(module).on_load_checkpoint, module) if own is None else own
    hook(checkpoint)
    carried.require_claimed(checkpoint.get(KEY, {}))


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
