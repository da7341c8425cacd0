"""Statistics that need more than one forward pass: gradients, and losses of cut models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from plprune.compensate import Compensation
from plprune.drivers.batches import Batch
from plprune.errors import ConfigError
from plprune.observe import StatMap
from plprune.progress import Progress, silent
from plprune.sensitivity import PLAIN, Setting, measured
from plprune.sharded import any_sharded
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.streaming.backward import slopes
from plprune.streaming.blocks import Held
from plprune.structured import StructuredMethod
from plprune.unwrap import evaluating


def gradients(
    model: nn.Module, spec: Spec, taps: Sequence[Tap], batches: Sequence[Batch]
) -> StatMap:
    """Statistics of a backward pass, one block at a time.

    Args:
        model: plain or wrapped, with its weights; its training mode is put back.
        spec: its spec.
        taps: of gradients.
        batches: of this rank.

    Returns:
        Sums over all ranks, on the CPU.

    Raises:
        ConfigError: if the weights are divided: strategies gather them for passes of their own.
    """
    with _held(model, spec, "gradients of single blocks") as source:
        return slopes(source, batches, taps)


def costs(
    model: nn.Module,
    spec: Spec,
    taps: Sequence[Tap],
    scores: Mapping[str, Tensor],
    batches: Sequence[Batch],
    progress: Progress = silent,
    setting: Setting = PLAIN,
) -> StatMap:
    """Losses of the model with one axis cut alone; see `sensitivity.curves`.

    Args:
        model: plain or wrapped, with its weights; its training mode is put back.
        spec: its spec.
        taps: of losses.
        scores: axis name -> [U], higher stays.
        batches: of this rank.
        progress: told after every block.
        setting: on how many sequences, and what follows a cut.

    Returns:
        Sums over all ranks, on the CPU.

    Raises:
        ConfigError: if the weights are divided.
    """
    with _held(model, spec, "losses of single cuts") as source:
        return measured(source, batches, taps, scores, progress, setting)


def setting_of(method: StructuredMethod, compensation: Compensation | None) -> Setting:
    """How an allocation measures losses of single cuts.

    Args:
        method: with its allocation.
        compensation: that follows its cuts.
    """
    return Setting(
        compensation=compensation,
        skip_first=method.skip_first_tokens,
        sequences=method.allocation.sequences,
    )


def needs_complete(what: str, method: str = "the method") -> ConfigError:
    """What to say of a look at the model that strategies with divided weights do not allow.

    Args:
        what: is looked at.
        method: looks.
    """
    return ConfigError(
        f"{what} need complete weights",
        given=f"{method} and a strategy that divides the weights (zero3, fsdp2)",
        allowed="strategy: auto, ddp, zero1 or zero2",
        fix="use one of those, or prune the folder first: plprune prune",
    )


@contextlib.contextmanager
def _held(model: nn.Module, spec: Spec, what: str) -> Iterator[Held]:
    if any_sharded(model.parameters()):
        raise needs_complete(what)
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        source = Held(model)
        source.spec = spec
        yield source
