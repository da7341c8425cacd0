"""The `plprune` command: LightningCLI, and prune, plan, evaluate, export and report beside it."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from plprune import dist
from plprune.callbacks import ExportHF, LoRARecovery, Prune, PruneReport, SizeMonitor
from plprune.callbacks.export import require_root
from plprune.errors import ConfigError, PlpruneError, first_line
from plprune.lit import logs, lost, outputs, preflight
from plprune.lit.config_files import require_configs
from plprune.lit.data import LitTokens
from plprune.lit.messages import is_first_process, is_refused_value, known_keys, ours, readable
from plprune.lit.model import LitCausalLM
from plprune.lit.progress import with_progress
from plprune.lit.readable import require_readable
from plprune.lit.run_config import RunConfig
from plprune.lit.run_parts import run_of
from plprune.lit.strategies import deepspeed
from plprune.lit.strategies.usable import (
    NAMES,
    require_one_dimension,
    require_settings,
    require_started,
)

_PARTS: tuple[tuple[str, type], ...] = (
    ("lora", LoRARecovery),
    ("monitor", SizeMonitor),
    ("report", PruneReport),
    ("export", ExportHF),
)
"""Optional top-level keys, in the order their callbacks run; null leaves them out."""


class PlpruneCLI(LightningCLI):
    """LightningCLI whose method, recovery, report and export settings are keys of their own.

    Entries of `trainer.callbacks` replace each other when YAMLs are stacked; keys merge.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True) -> None:
        """Parse and, with `run`, execute a subcommand.

        Args:
            args: command line without the program name; None takes `sys.argv`.
            run: False only builds trainer, module and data.

        Raises:
            PlpruneError: for a configuration that cannot be used, in one message.
        """
        # A prefix of a key is a typing mistake, not another name of it.
        raising: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        each = {name: dict(raising) for name in self.subcommands()} if run else {}
        # Lightning wants scripts to use sys.argv; our programs and tests pass arguments on purpose.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        super().__init__(
            LitCausalLM,
            LitTokens,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            parser_kwargs={**raising, **each},
            auto_configure_optimizers=False,  # `model.optimizer` and `model.learning_rate` do that
            args=list(args) if args is not None else None,
            run=run,
        )

    def _set_seed(self) -> None:
        """Seed; a number that is no seed is refused in one message."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(
                "seed_everything is out of range", given=first_line(error), fix="e.g. 0"
            ) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `prune` and the optional keys."""
        parser.add_lightning_class_args(Prune, "prune")
        for key, kind in _PARTS:
            parser.add_argument(f"--{key}", type=kind | None, default=None)
            parser.callback_keys.append(key)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint first; it holds no values that could override the config."""
        path = self.config.get(self.config.get("subcommand") or "", {}).get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and not path.startswith("registry"):
            require_readable(path)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Tell the trainer the checkpoint, whose size a model is built at; look before a fit."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        path = kwargs.get("ckpt_path")
        if path and Path(path).exists():
            self.trainer.ckpt_path = kwargs.pop("ckpt_path")
        if subcommand == "fit":
            run = run_of(self.config_init.fit, self.config.fit.trainer)
            preflight.require_possible(self.trainer, run)
            if is_first_process():
                outputs.keep_metrics(self.trainer)
        return kwargs

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what the parser refuses is said in one message."""
        require_configs(sys.argv[1:] if args is None else args)
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            name = next((a for a in args or sys.argv[1:] if a in self.subcommands()), None)
            keys = known_keys(self._parser(name))
            raise readable(error, name or "fit", keys) from error

    def instantiate_classes(self) -> None:
        """Make the objects; an error of a nested one is said in its own words."""
        try:
            self.build()
        except PlpruneError:
            raise
        except (ValueError, argparse.ArgumentError) as error:
            if isinstance(error, argparse.ArgumentError) or is_refused_value(error):
                raise readable(error, self.subcommand or "fit") from error
            raise

    def build(self) -> None:
        """Make model, data and trainer."""
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put the callbacks of the keys that are set before the user's own."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        extra = [
            self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys
        ]
        present = [callback for callback in extra if callback is not None]
        own = config.get("callbacks") or []
        require_settings(config)
        root = config.get("default_root_dir")
        if root is not None and "://" not in str(root):
            require_root(Path(root).expanduser())
        config["callbacks"] = []
        callbacks = [*present, *(own if isinstance(own, list) else [own])]
        shown = config.get("enable_progress_bar")
        try:
            trainer = self._instantiate_trainer(config, with_progress(callbacks, shown))
            require_started(trainer)
            require_one_dimension(trainer.strategy)
            if isinstance(trainer.strategy, deepspeed.ZeRO):
                trainer.strategy.require_usable()
            return trainer
        except PlpruneError:
            raise
        except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                "the trainer cannot be set up",
                given=first_line(error),
                allowed="what this machine has: trainer.accelerator, devices, strategy "
                f"({', '.join(NAMES)})",
                fix='pip install "plprune[deepspeed]"'
                if "deepspeed" in str(error).lower()
                else "see configs/strategies",
            ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `plprune` command.

    Args:
        argv: command line without the program name; None takes `sys.argv`.

    Returns:
        Exit status: 0, 2 after an error of the user's, told in one message by the first of
        several processes, or 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    logs.set_up()
    try:
        if args and args[0] in COMMANDS:
            COMMANDS[args[0]](args[1:])
        elif not args or args[0] in ("-h", "--help"):
            sys.stdout.write(USAGE)
        elif args[0] in PlpruneCLI.subcommands() or args[0].startswith("-"):
            PlpruneCLI(args if argv is not None else None)
        else:
            raise ConfigError(
                "unknown command",
                given=args[0],
                allowed=", ".join([*PlpruneCLI.subcommands(), *COMMANDS]),
                fix="plprune --help",
            )
    except ValueError as error:
        found = ours(error)
        if found is None:
            raise
        # All processes read the same configuration: one of them says what is wrong with it. What
        # goes wrong once they have met may have happened to this one alone.
        met = dist.world_size() > 1
        if dist.first_to_say(found.repeats or str(found)) if met else is_first_process():
            sys.stderr.write(f"plprune: {found}\n")
        return 2
    except SIGTERMException:  # its exit status would be that of a run that is complete
        sys.stderr.write(
            "plprune: stopped by SIGTERM before the end, nothing was merged or exported: go on "
            "from the last checkpoint (--ckpt_path)\n"
        )
        return 128 + signal.SIGTERM
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EPERM):
            raise
        sys.stderr.write(f"plprune: {_not_written(error)}\n")
        return 2
    except RuntimeError as error:
        gone = lost.said(error)
        if gone is None:
            raise
        if not getattr(error, lost.SAID, False):  # each process for itself: none can ask the others
            sys.stderr.write(f"plprune: {gone}\n")
        return 2
    return 0


def _not_written(error: OSError) -> ConfigError:
    return ConfigError(
        "a file cannot be written",
        given=f"{error.filename or 'a file of the run'} ({error.strerror})",
        allowed="a folder this process may write to, on a disk with space",
        fix="change trainer.default_root_dir, the folder of checkpoints, or permissions; go on "
        "from the last checkpoint (--ckpt_path)",
    )


def _lazy(name: str) -> Callable[[Sequence[str]], None]:
    def run(args: Sequence[str]) -> None:
        # Each command brings its own dependencies; `fit` must not pay for them.
        import_module(f"plprune.lit.{name}_command").run(args)

    return run


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    name: _lazy(name) for name in ("prune", "sensitivity", "plan", "evaluate", "export", "report")
}

USAGE = """usage: plprune COMMAND [--config FILE ...] [--key value ...]

train and prune (LightningCLI; `plprune fit --help` lists every key, YAMLs given by --config stack)
  fit        train, cut, recover, report, export
  validate   perplexity on the validation windows
  test       the same windows, logged as test_perplexity
  predict    negative log-likelihood of every token, for callbacks that write predictions

without training
  prune      prune a model block by block from its files; goes on where it was killed
  sensitivity  perplexity with one axis of one layer cut, for all of them

around it
  plan       print schedule, widths, parameters and memory of a fit; touches nothing
  evaluate   perplexity of a saved model, with its protocol
  export     write a checkpoint as a Hugging Face folder
  report     write HTML and Markdown again from a report.json
"""

if __name__ == "__main__":
    raise SystemExit(main())
