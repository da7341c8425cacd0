"""Checks around a run that is cut: who cannot take part, how long it is, its random state."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from plprune import dist
from plprune.cuts import commits_all
from plprune.describe import describe
from plprune.drivers.compensated import parts
from plprune.errors import CheckpointError, ConfigError, PlanError
from plprune.lit.arithmetic import warn_slow
from plprune.lit.strategies.usable import require_started
from plprune.lora import any_adapter
from plprune.methods.base import Method
from plprune.schedule import Length
from plprune.surgery.written import dora_refitted
from plprune.unwrap import find_model, unwrap

_COPIES = (
    "StochasticWeightAveraging",
    "WeightAveraging",
    "EMAWeightAveraging",
    "ModelPruning",
    "EMA",
)
"""Callbacks that keep copies or masks of parameters in their first shape."""


def refuse_conflicts(trainer: Trainer) -> None:
    """Refuse callbacks that would break, or silently spoil, a cut, and a second pruner.

    Arithmetic that is only slow is said.

    Args:
        trainer: with its callbacks.

    Raises:
        ConfigError: naming the callback.
    """
    require_started(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        names = [cls.__name__ for cls in type(callback).__mro__]
        found = next((name for name in names if name in _COPIES), None)
        if found is not None:
            raise ConfigError(
                f"{found} cannot run together with pruning",
                given=f"{type(callback).__name__} in trainer.callbacks",
                allowed="callbacks that keep no copies of weights",
                fix="average or mask in a second fit on the exported model",
            )
    pruners = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if hasattr(callback, "progressive") and callback.method is not None
    ]
    if len(pruners) > 1:
        raise ConfigError(
            "two callbacks prune one run",
            given=f"{len(pruners)} Prune callbacks with a method",
            allowed="one: its schedule makes all cuts",
            fix="give one Prune a schedule with more cuts, or cut again in a second fit on the "
            "exported model",
        )
    warn_slow(trainer)


def ensure_model(module: LightningModule) -> None:
    """Let a module that builds its model in `configure_model` build it now.

    Callbacks are set up before the module; adapters and descriptions need the model. Lightning asks
    `configure_model` to be idempotent, so the later call does no harm.

    Args:
        module: the user's module.
    """
    module.configure_model()


def require_same(module: LightningModule, model: nn.Module, attribute: str | None) -> None:
    """Refuse a module that built another model after callbacks got ready for the first.

    Args:
        module: the user's module.
        model: found in it when callbacks were set up.
        attribute: where the language model hangs.

    Raises:
        ConfigError: if the model is another object now.
    """
    if find_model(module, attribute) is not model:
        raise ConfigError(
            "the model was built a second time",
            given=f"{type(module).__name__}.configure_model",
            allowed="one that returns at once when the model is there, as Lightning asks",
            fix="begin it with `if self.model is not None: return`",
        )


def refuse_dora(method: Method, commit: str | int, cuts: int) -> None:
    """Refuse to train DoRA adapters on masked units, or under weights that are refitted.

    Args:
        method: as `Prune` holds it, with its compensation.
        commit: when tensors become smaller.
        cuts: how many there are.

    Raises:
        ConfigError: if some cuts are not committed at once.
        PlanError: if they are compensated.
    """
    if parts(method)[1] is not None:
        raise dora_refitted()
    if not commits_all(commit, cuts):
        raise ConfigError(
            "DoRA adapters cannot train on masked units",
            given="use_dora: true, and cuts that are only masked",
            allowed="smaller tensors at every cut: DoRA scales by a norm over all columns, "
            "masked or not",
            fix="set prune.commit: every",
        )


def length_of(trainer: Trainer) -> Length:
    """Length of a run in optimizer steps.

    Args:
        trainer: with its data connected.

    Returns:
        Steps in all and in one epoch.

    Raises:
        ConfigError: if the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ConfigError(
            "the run has no known end",
            given=f"{steps} optimizer steps",
            allowed="a positive number",
            fix="set trainer.max_steps, or trainer.max_epochs if the data have a length",
        )
    batches = trainer.num_training_batches
    per_epoch = (
        math.ceil(batches / trainer.accumulate_grad_batches)
        if math.isfinite(batches)
        else int(steps)
    )
    return Length(steps=int(steps), steps_per_epoch=max(1, per_epoch))


def require_close(masked: float, cut: float, dtype: torch.dtype) -> None:
    """A commit must not change what the model computes.

    Args:
        masked: loss of the masked model on the probe batch.
        cut: loss after the commit.
        dtype: of the weights; bfloat16 and float16 round differently in smaller products.

    Raises:
        PlanError: if the two differ by more than rounding, or the loss was not finite before.
    """
    if not math.isfinite(masked):
        raise PlanError(
            "the loss was not finite already before the cut",
            given=f"loss {masked:g} on a calibration row before, {cut:g} after",
            allowed="weights that give a finite loss",
            fix="check the weights of the model for NaN; if they came in training, go back to an "
            "earlier checkpoint with a lower learning rate, or use bf16 instead of fp16",
        )
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    if not abs(masked - cut) <= tolerance * max(1.0, abs(masked)):
        raise PlanError(
            "the cut model does not compute what the masked model did",
            given=f"loss {cut:.6f} after, {masked:.6f} before",
            allowed=f"a difference of {tolerance:g} at most",
            fix="report this with the model's config; train from the last checkpoint",
        )


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """Random state of a process, as tensors and plain lists."""

    cpu: Tensor
    """[bytes] uint8, torch on the CPU."""
    cuda: list[Tensor]
    """[bytes] uint8 for each CUDA device."""
    python: list[Any]
    """Of the `random` module: version, 625 integers, spare gaussian."""

    @classmethod
    def now(cls) -> RandomState:
        """The state at this moment."""
        version, numbers, spare = random.getstate()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(cpu=torch.get_rng_state(), cuda=cuda, python=[version, list(numbers), spare])

    def restore(self) -> None:
        """Continue from this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda)
        version, numbers, spare = self.python
        random.setstate((version, tuple(numbers), spare))

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint that loads with `weights_only=True`."""
        return dict(vars(self))

    @classmethod
    def of_all(cls) -> list[dict[str, Any]]:
        """The states of all ranks, for a checkpoint; all must call."""
        own = cls.now().to_dict()
        if dist.world_size() == 1:
            return [own]
        states: list[Any] = [None] * dist.world_size()
        torch.distributed.all_gather_object(states, own)
        return states

    @classmethod
    def mine(cls, states: Sequence[Mapping[str, Any]]) -> RandomState | None:
        """The state of this rank, if a rank of its number was there when they were saved."""
        return cls.from_dict(states[dist.rank()]) if dist.rank() < len(states) else None

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RandomState:
        """Back from a checkpoint."""
        return cls(cpu=state["cpu"].cpu(), cuda=list(state["cuda"]), python=list(state["python"]))


def pruner_of(trainer: Trainer) -> Any:
    """The callback of a run that prunes and has described its model, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if getattr(c, "progressive", None) is not None), None)


def progressive_of(trainer: Trainer) -> Any:
    """Pruning state of a run (a `Progressive`), or None without a pruning callback."""
    pruner = pruner_of(trainer)
    return None if pruner is None else pruner.progressive


def require_structure(model: nn.Module, parts: Mapping[str, Any], *, pruned: bool) -> None:
    """Refuse a checkpoint whose weights do not fit the model as it is now.

    Args:
        model: the language model, after callbacks restored what they know.
        parts: what the checkpoint carries, by part.
        pruned: whether a pruning callback restored the masks.

    Raises:
        CheckpointError: naming the setting that is missing.
    """
    saved = parts.get("prune", {})
    if "committed" in saved:
        wanted, found = saved["committed"]["blocks"], [vars(b) for b in describe(model).blocks]
        masked = saved["structure"]["fingerprint"] != saved["committed"]["fingerprint"]
        if wanted != found or (masked and not pruned):
            raise CheckpointError(
                "the checkpoint is of a pruned model",
                given=f"a checkpoint with {_first(saved['structure']['blocks'])}",
                allowed=f"{_first(found)}, as the model in memory",
                fix="use the config of the run with its `prune` key: plprune test --config RUN.yaml"
                " --ckpt_path FILE (in a script: give the Trainer the same Prune callback)",
            )
    if parts.get("lora", {}).get("injected", False) and not any_adapter(unwrap(model)):
        raise CheckpointError(
            "the checkpoint has LoRA adapters",
            given="a model without",
            fix="use the config of the run with its `lora` key (in a script: the same "
            "LoRARecovery)",
        )


def _first(blocks: list[dict[str, int]]) -> str:
    first = blocks[0]
    return f"{first['heads']} heads, {first['kv_heads']} KV heads and FFN {first['ffn']} in block 0"
