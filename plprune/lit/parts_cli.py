"""The configuration of `fit` for commands that train nothing."""

from __future__ import annotations

from plprune.lit.cli import PlpruneCLI


class PartsCLI(PlpruneCLI):
    """The parser of `fit`; model, data and callbacks are made, the trainer is not."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the keys of `fit`."""
        return {"fit": PlpruneCLI.subcommands()["fit"]}

    def build(self) -> None:
        """Make everything but the trainer, whose accelerator may be on another machine."""
        trainer = self.config.fit.trainer
        self.trainer_settings = trainer.clone()
        for heavy in ("strategy", "logger", "plugins", "profiler"):
            trainer[heavy] = "auto" if heavy == "strategy" else None
        given = trainer.callbacks or []
        given = given if isinstance(given, list) else [given]
        # Loggers and monitors may want services; plprune's own callbacks are enough.
        trainer.callbacks = [
            one for one in given if str(one.get("class_path", "")).startswith("plprune.")
        ]
        self.config_init = self.parser.instantiate_classes(self.config)

    def after_instantiate_classes(self) -> None:
        """Leave nothing to run."""
        self.subcommand = None
