"""What a second person needs to repeat a run: data, settings, seed, versions, command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from plprune.lit.guard import pruner_of

LIBRARIES = ("plprune", "torch", "transformers", "lightning", "peft")
"""Packages whose versions a protocol names."""


def protocol(
    trainer: Trainer, module: LightningModule, result: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How a run was made and measured, as plain values.

    Args:
        trainer: with its data module.
        module: the user's.
        result: `to_dict` of the last perplexity, or None if none was measured.

    Returns:
        Keys of `report_tables.PROTOCOL`; `training`, `pruning` and `lora`; and, if the data module
        can describe itself, what it says under `data.`.
    """
    data: Any = getattr(trainer, "datamodule", None)
    described = data.describe() if hasattr(data, "describe") else {}
    measured = (result or {}).get("protocol", {})
    history = _history(trainer)
    values: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "data": _text(measured.get("source")) + _hash(measured.get("text_sha256")),
        "windows": measured.get("windows"),
        "length": measured.get("seq_len"),
        "evaluation_dtype": measured.get("dtype"),
        "training_precision": str(trainer.precision),
        "seed": run_seed(),
        "tokenizer": described.get("tokenizer"),
        "device": str(trainer.strategy.root_device),
        "optimizer_steps": trainer.global_step,
        "versions": versions(),
        "plan_hashes": ", ".join(entry["plan"] for entry in history) or "none",
        "command": command_line(sys.argv),
        "config": "in full at the end of the report"
        if config_of(trainer)
        else "none: not from YAML",
        "training": _training(trainer, module),
        "pruning": _pruning(trainer),
        "lora": _lora(trainer),
        **_calibration(described, history),
        **{f"data.{key}": _plain(value) for key, value in described.items()},
    }
    return {key: value for key, value in values.items() if value is not None}


def versions() -> str:
    """Versions of the libraries that matter, in one line."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    )


def run_seed() -> int | None:
    """Seed that Lightning's `seed_everything` set, None if nobody called it."""
    text = os.environ.get("PL_GLOBAL_SEED", "")
    return int(text) if text.lstrip("-").isdigit() else None


def config_of(trainer: Trainer) -> str:
    """Complete configuration of a run from YAML; empty for a script.

    Args:
        trainer: with its callbacks.

    Returns:
        YAML text.
    """
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = (getattr(callback, "config_yaml", None) for callback in callbacks)
    return next((str(text) for text in found if text), "")


def command_line(argv: Sequence[str]) -> str:
    """The command that started this process, ready for a shell.

    Args:
        argv: `sys.argv`.

    Returns:
        `plprune ...` for our program, else `python ...`.
    """
    program, *rest = argv or [""]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if Path(program).stem == "plprune":
        words = ["plprune"]
    elif spec is not None:  # python -m
        words = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif program in ("", "-c"):
        return "Python code that is in no file"
    else:
        words = ["python", program]
    return shlex.join([*words, *rest])


def _history(trainer: Trainer) -> list[dict[str, Any]]:
    progressive = getattr(pruner_of(trainer), "progressive", None)
    return [] if progressive is None else list(progressive.history)


def _training(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    data: Any = getattr(trainer, "datamodule", None) or trainer.train_dataloader
    optimizers, schedulers = _optimizers(trainer)
    algorithm = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
    clip = trainer.gradient_clip_val
    values = {
        "optimizer": [_optimizer(name, groups[0]) for name, groups in optimizers],
        "learning_rate": _rate(module, [group for _, groups in optimizers for group in groups]),
        "scheduler": schedulers,
        "batch_size": getattr(data, "batch_size", None),
        "processes": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "gradient_clipping": f"{clip} by {algorithm or 'norm'}" if clip else "none",
        "weights_dtype": getattr(module, "dtype_name", None),
    }
    return {key: _plain(value) for key, value in values.items() if value is not None}


def _optimizers(trainer: Trainer) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[str]]:
    """Class and groups of every optimizer, and classes of schedulers."""
    told = getattr(trainer.strategy, "told", None)
    if told is not None:  # DeepSpeed wraps them, and takes them away before an export
        return [(told.optimizer, told.groups)], told.schedulers
    schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    return [(type(o).__name__, o.param_groups) for o in trainer.optimizers], schedulers


def _optimizer(name: str, group: Mapping[str, Any]) -> str:
    names = ("betas", "eps", "momentum", "weight_decay")
    return f"{name} {_words({n: group[n] for n in names if n in group})}".strip()


def _rate(module: LightningModule, groups: Sequence[Mapping[str, Any]]) -> Any:
    """Settings of our module's curve; of another module the rate its optimizers began with."""
    rate = getattr(module, "rate", None)
    if rate is not None and is_dataclass(rate) and not isinstance(rate, type):
        return asdict(rate)
    return [group.get("initial_lr", group.get("lr")) for group in groups]


def _pruning(trainer: Trainer) -> Any:
    pruner: Any = pruner_of(trainer)
    if pruner is None:
        return "none"
    watched = pruner.statistics
    training = f"training passes of {watched.window} steps"
    return {
        "method": f"{pruner.method.label} {_words(pruner.method.hyper())}".strip(),
        "budget": _plain(pruner.budget.to_dict()),
        "schedule": str(pruner.schedule),
        "commit": pruner.commit,
        "optimizer_state": pruner.optimizer_state,
        "statistics": training if watched.source == "training" else watched.source,
    }


def _lora(trainer: Trainer) -> Any:
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((callback for callback in callbacks if hasattr(callback, "merge_at_end")), None)
    if found is None:
        return "none"
    config = _plain(found.config) or "defaults of plprune.lora"
    return {"start": found.start, "merged": found.merge_at_end, "config": config}


def _calibration(
    described: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Two hashes of different tokens, each under a name that says which."""
    pool = (described.get("calibration") or {}).get("token_sha256")
    last = history[-1]["calibration"] if history else None
    return {
        "calibration pool, sha256": pool or None,
        "calibration set of the last cut, sha256": last or None,
    }


def _plain(value: Any) -> Any:
    """Something JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _text(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _hash(value: object) -> str:
    return "" if value is None else f" (sha256 {str(value)[:16]})"
