"""Write the trained model as a Hugging Face folder at the end of `fit`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, final, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from plprune.describe import describe
from plprune.dist import together
from plprune.drivers.progressive import dense_and_now
from plprune.errors import ConfigError, ExportError
from plprune.export import save_hf
from plprune.export_card import CardInfo
from plprune.export_config import Mode
from plprune.lit import guard, measured, outputs
from plprune.lit.foreseen import require_exportable, warn_wider
from plprune.lit.strategies import adapter_for
from plprune.load import STRUCTURE_FILE, load_tokenizer
from plprune.lora import Injected
from plprune.sharded import any_sharded
from plprune.surgery.rebuild import structure_of
from plprune.unwrap import find_model, unwrap

log = logging.getLogger(__name__)


DType = Literal["float32", "bfloat16", "float16"]


@final
class ExportHF(Callback):
    """Save the model so that plain `from_pretrained` loads it."""

    def __init__(
        self,
        directory: str,
        *,
        mode: Mode = "auto",
        dtype: DType | None = None,
        tokenizer: str | None = None,
        overwrite: bool = False,
        attribute: str | None = None,
    ) -> None:
        """Set up; the target is checked before training starts.

        Args:
            directory: where to write.
            mode: stock class (`plain`), own short modeling file (`per_layer`), or whichever fits
                (`auto`).
            dtype: of the saved weights; default the model's.
            tokenizer: directory or hub id, or `none` to write none; default the data module's, else
                the base model's. Loaded before training.
            overwrite: replace an existing directory.
            attribute: where the language model hangs in the module; default the only one in it.

        Raises:
            ConfigError: for an unknown mode or number format.
        """
        for name, value, choices in (
            ("mode", mode, get_args(Mode)),
            ("dtype", dtype, (None, *get_args(DType))),
        ):
            if value not in choices:
                raise ConfigError(
                    f"unknown export.{name}",
                    given=repr(value),
                    allowed=", ".join(str(choice) for choice in choices),
                )
        if not isinstance(directory, (str, Path)):
            raise ConfigError("export.directory is no folder", given=repr(directory))
        self.directory, self.mode, self.dtype = Path(directory), mode, dtype
        self.tokenizer, self.overwrite, self.attribute = tokenizer, overwrite, attribute
        self.written: Path | None = None

    @property
    def writes(self) -> Path:
        """The folder that is replaced."""
        return self.directory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a target that cannot be written before hours of training."""
        if stage == "fit":
            outputs.require_last(trainer, self)
            outputs.require_last(trainer, self, after="report")
            outputs.require_apart(trainer)
            outputs.end_complete_runs(trainer)
            with together():
                if trainer.is_global_zero:
                    self.require_target(trainer)
            guard.ensure_model(pl_module)
            model = find_model(pl_module, self.attribute)
            require_exportable(trainer, unwrap(model), self.directory, self.mode, self._dtype())
            remote = bool(getattr(pl_module, "trust_remote_code", False))
            warn_wider(unwrap(model), self._dtype(), trust_remote_code=remote)
            self._dense, self._loaded = dense_and_now(model)[0], None
            with together():
                if trainer.is_global_zero:
                    self._loaded = self._tokenizer(trainer, unwrap(model))

    def require_target(self, trainer: Trainer) -> None:
        """Refuse a folder that is there or cannot be made."""
        del trainer
        require_writable(
            self.directory,
            overwrite=self.overwrite,
            ours=lambda names: STRUCTURE_FILE in names,
            key="export.overwrite: true",
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, unless the run was interrupted."""
        model: Any = unwrap(find_model(pl_module, self.attribute))
        if trainer.interrupted:
            return
        if any_sharded(model.parameters()):
            adapter_for(trainer.strategy).rest(trainer)  # an evaluation leaves weights put together
            self._write(trainer, pl_module, model)  # all ranks help
            return
        with together():
            if trainer.is_global_zero:
                self._write(trainer, pl_module, model)

    def _dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else cast(torch.dtype, getattr(torch, self.dtype))

    def _write(self, trainer: Trainer, pl_module: LightningModule, model: Any) -> None:
        progressive = guard.progressive_of(trainer)
        spec = describe(model) if progressive is None else progressive.spec
        dense = self._dense if progressive is None else progressive.dense
        self.written = save_hf(
            model,
            self.directory,
            spec=spec,
            structure=structure_of(spec, dense),
            tokenizer=self._loaded,
            card=CardInfo(**self._card(trainer, pl_module, model)),
            overwrite=self.overwrite,
            dtype=self._dtype(),
            mode=self.mode,
            adapters=_adapters(trainer, model),
        )
        log.info("exported to %s", self.written)

    def _card(self, trainer: Trainer, pl_module: LightningModule, model: Any) -> dict[str, Any]:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        pruner = guard.pruner_of(trainer)
        report = next((c.report for c in callbacks if getattr(c, "report", None) is not None), None)
        base = str(
            getattr(pl_module, "pretrained", "") or getattr(model.config, "_name_or_path", "")
        )
        return measured.card(trainer, base, pruner, report)

    def _tokenizer(self, trainer: Trainer, model: Any) -> Any:
        """Loaded before training: without it the result could not be written."""
        data: Any = getattr(trainer, "datamodule", None)
        if self.tokenizer is None and hasattr(data, "loaded_tokenizer"):
            return data.loaded_tokenizer()
        name = self.tokenizer or getattr(model.config, "_name_or_path", "")
        if name == "none":
            return None
        if not name:
            raise ConfigError(
                "no tokenizer for the export",
                given="a model that does not know where it came from, no data module of plprune",
                allowed="a folder, a hub id, or none",
                fix='say ExportHF(..., tokenizer=DIR), or tokenizer="none" to export without one',
            )
        return load_tokenizer(name)


def _adapters(trainer: Trainer, model: Any) -> Injected | None:
    """Adapters that stay beside the base: `lora.merge: false`."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = (getattr(callback, "injected", None) for callback in callbacks)
    return next((one for one in found if one is not None and one.model is model), None)


def require_writable(
    directory: Path,
    *,
    overwrite: bool,
    ours: Callable[[set[str]], bool],
    key: str = "--overwrite",
) -> None:
    """Refuse a target directory that exists or cannot be made.

    Args:
        directory: target.
        overwrite: whether it may exist.
        ours: says of the names in a directory that is not empty whether it may be replaced.
        key: what a user sets to let it be replaced.

    Raises:
        ExportError: naming the directory and the way out.
    """
    if directory.exists() and not overwrite:
        file = directory.is_file()
        raise ExportError(
            "the target directory is a file" if file else "the target directory exists",
            given=str(directory),
            allowed="a directory that does not exist yet",
            fix="choose another one" + ("" if file else f", or replace it with {key}"),
        )
    if directory.exists():
        names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {""}
        if names and not ours(names):
            raise ExportError(
                "will not overwrite what an earlier run did not write",
                given=str(directory),
                allowed="an empty directory or one from an earlier run",
                fix="choose another directory, or remove this one yourself",
            )
    parent = next(
        p for p in (directory.absolute().parent, *directory.absolute().parents) if p.exists()
    )
    if not _takes_files(parent):
        raise ExportError(
            "cannot write the target directory",
            given=f"{directory} below {parent}",
            allowed="a writable parent directory",
            fix="choose another directory or change its permissions",
        )


def require_root(directory: Path) -> None:
    """Refuse a folder for logs and checkpoints that is none, or cannot be made.

    Args:
        directory: `trainer.default_root_dir`.

    Raises:
        ConfigError: naming it.
    """
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    if not parent.is_dir() or not _takes_files(parent):
        raise ConfigError(
            "cannot write below trainer.default_root_dir",
            given=str(directory) + (f" ({parent} is a file)" if parent.is_file() else ""),
            allowed="a folder, or one that can be made in a writable one",
            fix="choose another folder or change its permissions",
        )


def _takes_files(folder: Path) -> bool:
    """Try it: permissions say nothing to root, on read-only disks and in special file systems."""
    try:
        with tempfile.TemporaryDirectory(prefix=".plprune-", dir=folder):
            return True
    except OSError:
        return False
