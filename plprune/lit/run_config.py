"""The configuration of a run: beside its logs, inside its checkpoints, in its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from plprune.files import write_text
from plprune.lit import carry

FILE = "plprune_config.yaml"
PART = "config"
"""Name of the part of a checkpoint that holds it."""


class RunConfig(SaveConfigCallback):
    """Writes the resolved configuration of a `fit`; never over that of another run."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        """Take what `LightningCLI` hands over."""
        super().__init__(parser, config, save_to_log_dir=False, **options)
        self.config_yaml: str = parser.dump(config, skip_none=False)
        """All keys with the values of this run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the configuration travel with every checkpoint."""
        if stage == "fit":
            saved = {"yaml": self.config_yaml}
            carry.carry(trainer, pl_module, PART, lambda: saved, lambda _: None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it: a run that is refused before leaves nothing."""
        # On all ranks: the trainer asks rank 0 for its folder, and all must answer.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; called on rank 0."""
        folder = self._folder
        if "://" in str(folder):
            return  # checkpoints have it
        folder.mkdir(parents=True, exist_ok=True)
        target = _free(folder, self.config_yaml)
        if target is not None:
            write_text(target, self.config_yaml)


def _free(folder: Path, text: str) -> Path | None:
    """A name that is not taken, or None if the same text is there already."""
    number = 1
    while True:
        suffix = "" if number == 1 else f"_{number}"
        path = folder / FILE.replace(".yaml", f"{suffix}.yaml")
        if not path.exists():
            return path
        if path.read_text("utf-8") == text:
            return None
        number += 1
