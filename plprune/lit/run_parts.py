"""The parts of a `fit`, made or told, for those who look at it before it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from plprune.lit.run_length import accumulation, devices


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run."""

    model: Any
    """`LitCausalLM`, nothing loaded."""
    data: Any
    """`LitTokens`, nothing read."""
    trainer: Any
    """Arguments of the trainer, by name, as the configuration has them."""
    pruner: Any = None
    """`Prune` with a method, or None."""
    lora: Any = None
    """`LoRARecovery`, or None."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on all devices."""
        batch = self.data.batch_size * self.data.corpus.seq_len
        return int(batch * accumulation(self.trainer) * devices(self.trainer))

    @property
    def strategy(self) -> str:
        """Its name in `plprune.memory_shared.SHARDED`; one that is not known shares nothing."""
        given = self.trainer.get("strategy", "auto")
        text = str(given if isinstance(given, str) else given.get("class_path", "")).lower()
        if re.fullmatch("zero[123](_offload)?", text):
            return text[:5]
        if "deepspeed" in text:
            return f"zero{_stage(given)}"
        if any(name in text for name in ("fsdp", "modelparallel", "fully_shard")):
            return "fsdp"
        return "single" if devices(self.trainer) == 1 else "ddp"

    @property
    def divided(self) -> bool:
        """Whether the strategy divides weights."""
        return self.strategy in ("zero3", "fsdp")


def _stage(given: Any) -> int:
    """ZeRO stage of a strategy; its DeepSpeed config goes first, if it is not a file."""
    if isinstance(given, str):
        named = re.search("stage_([123])", given)
        return int(named[1]) if named is not None else 2
    settings = given.get("init_args") or {}
    config = settings.get("config")
    stated = (config.get("zero_optimization") or {}) if isinstance(config, dict) else {}
    return int(stated.get("stage", settings.get("stage", 2)))


def run_of(made: Any, trainer: Any) -> Run:
    """The parts of a configured run.

    Args:
        made: objects by key, as the command line made them.
        trainer: arguments of the trainer, by name.
    """
    callbacks = made.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    found = [made.prune, made.lora, *callbacks]
    return Run(
        model=made.model,
        data=made.data,
        trainer=trainer,
        pruner=next((c for c in found if getattr(c, "method", None) is not None), None),
        lora=next((c for c in found if hasattr(c, "merge_at_end")), None),
    )
